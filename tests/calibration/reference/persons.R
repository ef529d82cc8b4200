# Reference weights of persons in households by R's survey: Rscript persons.R (from this folder; packages survey, laeken).
# All of eusilc, one weight per household (aggregate.stage), raking with the ratio of weights between 0.5 and 2.
# persons.csv: the persons; persons_targets.csv: the totals, as calibrate.py reads them; persons_weights.csv: one
# initial and one calibrated weight per household, and two with bounds so narrow that a fifth of the households end at
# them (raking, linear); persons_errors.csv: linearised standard errors.
suppressMessages({library(survey); library(laeken)})
options(digits = 17, survey.lonely.psu = "adjust")
write_table <- function(table, name) {
  con <- gzfile(paste0(name, ".csv.gz"), "w")
  write.csv(format(table, digits = 17, trim = TRUE), con, row.names = FALSE, quote = FALSE)
  close(con)
}
data(eusilc)
p <- eusilc[order(eusilc$db030), c("db030", "rb030", "db040", "age", "rb090", "rb050")]
p <- p[!is.na(p$age) & !is.na(p$rb090), ]
p$group <- cut(p$age, c(-Inf, 15, 30, 45, 60, 75, Inf))
d <- svydesign(id = ~db030 + rb030, weights = ~rb050, data = p)
f <- ~db040 + group + rb090
x <- model.matrix(f, p)
set.seed(7)
totals <- colSums(x * p$rb050) * c(1, 1 + 0.04 * runif(ncol(x) - 1, -1, 1))
p$child <- as.numeric(p$age < 18)
d <- update(d, child = p$child)
calibrated <- calibrate(d, f, totals, calfun = "raking", bounds = c(0.5, 2), aggregate.stage = 1,
                        epsilon = 1e-12, maxit = 500)
w <- weights(calibrated)
first <- !duplicated(p$db030)
stopifnot(max(abs(colSums(x * w) / totals - 1)) < 1e-9, all(w == w[first][match(p$db030, p$db030[first])]))
above <- c("", "age > 15 and age <= 30", "age > 30 and age <= 45", "age > 45 and age <= 60", "age > 60 and age <= 75", "age > 75")
names(above) <- paste0("group", levels(p$group))
where <- sapply(names(totals), function(n) {
  if (n == "(Intercept)") "" else if (n %in% names(above)) above[[n]] else
    sub("^(db040|rb090)(.*)$", "\\1 == '\\2'", n)
})
write_table(p[, c("db030", "rb030", "age", "rb090", "child")], "persons")
write_table(data.frame(name = make.names(names(totals)), value = totals, where = where, unit = "person"), "persons_targets")
narrow <- function(calfun, bounds) {
  found <- weights(calibrate(d, f, totals, calfun = calfun, bounds = bounds, aggregate.stage = 1, epsilon = 1e-12, maxit = 2000))
  stopifnot(max(abs(colSums(x * found) / totals - 1)) < 1e-9, all(found == found[first][match(p$db030, p$db030[first])]))
  ratio <- found / p$rb050
  cat(calfun, bounds, range(ratio), mean(ratio[first] < bounds[1] * (1 + 1e-9) | ratio[first] > bounds[2] * (1 - 1e-9)), "\n")
  found[first]
}
raking_narrow <- narrow("raking", c(0.85, 1.2))
linear_narrow <- narrow("linear", c(0.85, 1.2))
write_table(data.frame(db030 = p$db030[first], db040 = p$db040[first], weight = p$rb050[first], calibrated = w[first], raking_narrow, linear_narrow), "persons_weights")
one <- function(statistic, name, found) data.frame(name = name, statistic = statistic, estimate = unname(coef(found)), se = unname(as.vector(SE(found))))
write_table(rbind(
  one("total", "age", svytotal(~age, calibrated)), one("mean", "age", svymean(~age, calibrated)),
  one("total", "child", svytotal(~child, calibrated)), one("mean", "child", svymean(~child, calibrated)),
  one("ratio", "child/age", svyratio(~child, ~age, calibrated))
), "persons_errors")
