"""Parts of a training run: data, optimizers, loss scaling, progress, monitors."""
