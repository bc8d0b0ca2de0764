"""bitfold folds the weights of neural networks into few bits."""
