"""Components of a training run: data, optimizers, loss scaling, progress and monitors."""
