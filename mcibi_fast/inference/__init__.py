"""Images and videos to predictions, scores and exported files."""
