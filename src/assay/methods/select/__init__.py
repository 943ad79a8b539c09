"""Selection: each file is one way to choose the windows of text that a model is measured on."""
