"""The difficulty ladder of the synthetic cohort: networks beside ever better simple regressors."""
