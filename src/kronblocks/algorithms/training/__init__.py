"""The `Sparsifier`, which runs an algorithm in a training, and what follows the user's model and optimisers."""
