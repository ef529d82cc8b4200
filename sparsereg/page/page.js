// Sort a table by the column whose heading is pressed, and show the rows that hold a text.
"use strict";
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const body = table.tBodies[0];
  const headings = Array.from(table.tHead.rows[0].cells);
  headings.forEach((heading, column) => {
    const button = heading.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const numeric = heading.classList.contains("n");
      const before = heading.getAttribute("aria-sort");
      const descending = before ? before !== "descending" : numeric;
      const value = (row) => {
        const cell = row.cells[column];
        if (!numeric) return cell.textContent;
        return cell.dataset.v === "" ? null : Number(cell.dataset.v);
      };
      const order = (a, b) => {
        const x = value(a), y = value(b);
        if (x === null || y === null) return (x === null) - (y === null);  // what is not known comes last
        const sign = numeric ? x - y : x.localeCompare(y);
        return descending ? -sign : sign;
      };
      body.append(...Array.from(body.rows).sort(order));
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    });
  });
}
for (const field of document.querySelectorAll("input[data-filters]")) {
  field.hidden = false;
  const body = document.getElementById(field.dataset.filters).tBodies[0];
  field.addEventListener("input", () => {
    const text = field.value.toLowerCase();
    for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(text);
  });
}
