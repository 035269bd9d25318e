"""Default values that several parts of the package share."""

IGNORE_INDEX = 255  # the label of pixels without a class
MOMENTUM = 0.1  # m of the memory update (Eq. 6): the share of the new statistics
LARGE_WINDOW = (512, 512)  # (height, width) of windows for large images: the usual training crop
LARGE_IMAGE = 2  # an image is large if it has more pixels than this many such windows
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of colours in 0..1: the usual normalisation of images
IMAGENET_STD = (0.229, 0.224, 0.225)
