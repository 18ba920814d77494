"""SURGERY: a trained model -> another model, which trains, exports and reports like any. Each paper brings its own."""
