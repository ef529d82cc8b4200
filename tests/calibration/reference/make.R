# Reference weights by R's survey: Rscript make.R (from this folder; packages survey, laeken, sampling).
# Each problem is one CSV: weight, factor, low, high, the columns x1.. of the targets, and one column of calibrated
# weights per distance; its first row holds the totals of x1.. .
suppressMessages({library(survey); library(laeken)})
options(digits = 17, survey.lonely.psu = "adjust")
exact <- 1e-12

write_case <- function(name, x, totals, weight, results, bounds, factor = 1) {
  x <- as.matrix(x)
  colnames(x) <- paste0("x", seq_len(ncol(x)))
  table <- data.frame(weight = weight, factor = factor, low = bounds[1], high = bounds[2], x)
  for (n in names(results)) table[[n]] <- results[[n]]
  first <- table[1, ]
  first[] <- NA
  first[colnames(x)] <- totals
  con <- gzfile(paste0(name, ".csv.gz"), "w")
  write.csv(format(rbind(first, table), digits = 17, trim = TRUE), con, row.names = FALSE, quote = FALSE)
  close(con)
}

all_of <- function(design, formula, totals, bounds, ...) {
  take <- function(...) weights(calibrate(design, formula, totals, epsilon = exact, maxit = 500, ...))
  cases <- list(
    linear = list(calfun = "linear"),
    raking = list(calfun = "raking"),
    linear_bounded = list(calfun = "linear", bounds = bounds),
    raking_bounded = list(calfun = "raking", bounds = bounds),
    logit_bounded = list(calfun = "logit", bounds = bounds)
  )
  found <- lapply(names(cases), function(n) tryCatch(
    suppressWarnings(do.call(take, c(cases[[n]], list(...)))),
    error = function(e) { message(n, ": R does not converge, left out"); NULL }
  ))
  names(found) <- names(cases)
  Filter(Negate(is.null), found)
}

data(api)
f <- ~stype + api99
totals <- c(`(Intercept)` = 6194, stypeH = 755, stypeM = 1018, api99 = 3914069)
for (kind in c("apiclus1", "apistrat")) {
  d <- if (kind == "apiclus1") svydesign(id = ~dnum, weights = ~pw, data = apiclus1, fpc = ~fpc) else
    svydesign(id = ~1, strata = ~stype, weights = ~pw, data = apistrat, fpc = ~fpc)
  frame <- if (kind == "apiclus1") apiclus1 else apistrat
  b <- if (kind == "apiclus1") c(0.7, 1.7) else c(0.9, 1.2)
  t <- if (kind == "apiclus1") totals else replace(totals, "api99", 3980000)
  write_case(kind, model.matrix(f, frame), t, weights(d), all_of(d, f, t, b), b)
}

# Persons in households: one weight per household, by the sums of its members.
data(eusilc)
eusilc$age_group <- cut(eusilc$age, c(-Inf, 15, 30, 45, 60, 75, Inf))
eusilc <- eusilc[order(eusilc$db030), ]
eusilc <- eusilc[eusilc$db030 %in% unique(eusilc$db030)[1:2000], ]
eusilc <- eusilc[!is.na(eusilc$rb090) & !is.na(eusilc$age_group), ]
d <- svydesign(id = ~db030 + rb030, weights = ~rb050, data = eusilc)
f <- ~db040 + age_group + rb090
x <- model.matrix(f, eusilc)
w <- weights(d)
set.seed(1)
totals <- colSums(x * w) * c(1, 1 + 0.03 * runif(ncol(x) - 1, -1, 1))
cluster <- all_of(d, f, totals, c(0.5, 2), aggregate.stage = 1)
first <- !duplicated(eusilc$db030)
size <- as.vector(table(factor(eusilc$db030, unique(eusilc$db030))))
sums <- rowsum(x, eusilc$db030, reorder = FALSE)
write_case("eusilc", sums, totals, w[first], lapply(cluster, function(v) v[first]), c(0.5, 2), 1 / size)

data(nhanes)
nhanes <- nhanes[complete.cases(nhanes) & nhanes$SDMVSTRA <= 77, ]
d <- svydesign(id = ~SDMVPSU, strata = ~SDMVSTRA, weights = ~WTMEC2YR, nest = TRUE, data = nhanes)
f <- ~factor(race) + factor(agecat) + factor(RIAGENDR)
x <- model.matrix(f, nhanes)
w <- weights(d)
totals <- colSums(x * w) * c(1, 1 + 0.02 * sin(seq_len(ncol(x) - 1)))
b <- c(0.6, 1.6)
write_case("nhanes", x, totals, w, all_of(d, f, totals, b), b)
