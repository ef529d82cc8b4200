# Reference standard errors by R's survey: Rscript variance.R (from this folder). One CSV per sample with what a
# calibration needs and the columns that are estimated, and variance.csv with the standard errors.
suppressMessages(library(survey))
options(digits = 17, survey.lonely.psu = "adjust")
data(api)
totals <- c(`(Intercept)` = 6194, stypeH = 755, stypeM = 1018, api99 = 3914069)
write_table <- function(table, file) {
  con <- gzfile(file, "w")
  write.csv(format(table, digits = 17, trim = TRUE), con, row.names = FALSE, quote = FALSE)
  close(con)
}
rows <- NULL
add <- function(sample, method, distance, statistic, value) {
  rows <<- rbind(rows, data.frame(sample, method, distance, statistic, se = format(unname(value), digits = 17)))
}
errors <- function(sample, method, distance, design) {
  add(sample, method, distance, "mean api00", SE(svymean(~api00, design)))
  add(sample, method, distance, "mean api.stu", SE(svymean(~api.stu, design)))
  add(sample, method, distance, "total enroll", SE(svytotal(~enroll, design)))
  add(sample, method, distance, "ratio api.stu/enroll", SE(svyratio(~api.stu, ~enroll, design))[[1]])
}
for (sample in c("apiclus1", "apistrat")) {
  frame <- get(sample)
  d <- if (sample == "apiclus1") svydesign(id = ~dnum, weights = ~pw, data = frame, fpc = ~fpc) else
    svydesign(id = ~1, strata = ~stype, weights = ~pw, data = frame, fpc = ~fpc)
  t <- if (sample == "apiclus1") totals else replace(totals, "api99", 3980000)
  r <- as.svrepdesign(d, type = if (sample == "apiclus1") "JK1" else "JKn")
  for (distance in c("linear", "raking")) {
    errors(sample, "linearized", distance, calibrate(d, ~stype + api99, t, calfun = distance, epsilon = 1e-12, maxit = 100))
    errors(sample, "jackknife", distance, calibrate(r, ~stype + api99, t, calfun = distance, epsilon = 1e-12, maxit = 100))
  }
  add(sample, "linearized", "none", "mean api00", SE(svymean(~api00, d)))
  write_table(frame[, c("dnum", "pw", "fpc", "stype", "api99", "api00", "api.stu", "enroll")], paste0("variance_", sample, ".csv.gz"))
}
write_table(rows, "variance.csv.gz")
