"""L0 regularization with Hard Concrete gates."""

__version__ = "0.1.0"
