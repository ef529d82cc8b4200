# What publishable.py asks of R's package survey: Rscript publishable.R FOLDER, or Rscript publishable.R errors.
suppressMessages(library(survey))
options(digits = 17, survey.lonely.psu = "adjust")
argument <- commandArgs(trailingOnly = TRUE)[1]

solve_case <- function(folder) {
  read <- function(name, what) {
    file <- file.path(folder, name)
    readBin(file, what, n = file.size(file) / if (what == "integer") 4 else 8)
  }
  shape <- read("shape.bin", "integer")
  x <- matrix(0, shape[2], shape[1])
  x[cbind(read("household.bin", "integer") + 1L, read("target.bin", "integer") + 1L)] <- read("entry.bin", "double")
  w <- read("weight.bin", "double")
  q <- read("factor.bin", "double")
  bounds <- as.list(setNames(read("bounds.bin", "double"), c("lower", "upper")))
  distance <- readLines(file.path(folder, "distance.txt"))
  totals <- read("totals.bin", "double")
  function_of <- list(linear = cal.linear, raking = cal.raking, logit = cal.logit)[[distance]]
  spent <- system.time(
    # The solver below survey::calibrate, which would first make its matrix from a formula.
    g <- grake(x, w, function_of, bounds = bounds, population = totals, epsilon = 1e-10, verbose = FALSE,
               maxit = 100, variance = 1 / q)
  )
  if (is.null(g)) stop("no convergence")
  writeBin(w * as.vector(g), file.path(folder, "found.bin"))
  cat(sum(spent[c("user.self", "sys.self", "user.child", "sys.child")]), "\n")
}

errors <- function() {
  data(api)
  d <- svydesign(id = ~dnum, weights = ~pw, data = apiclus1, fpc = ~fpc)
  totals <- c(`(Intercept)` = 6194, stypeH = 755, stypeM = 1018, api99 = 3914069)
  f <- ~stype + api99
  spent <- system.time({
    linearized <- SE(svymean(~api00, calibrate(d, f, totals)))
    jackknife <- SE(svymean(~api00, calibrate(as.svrepdesign(d, type = "JK1"), f, totals)))
  })
  cat(linearized, jackknife, sum(spent[1:2]), "\n")
}

if (argument == "errors") errors() else solve_case(argument)
