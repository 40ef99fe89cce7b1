"""Image data sets: loading, splits, preprocessing, augmentation."""
