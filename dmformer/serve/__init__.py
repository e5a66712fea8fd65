"""What answers with a bundle: the predictor, and folders for model servers."""
