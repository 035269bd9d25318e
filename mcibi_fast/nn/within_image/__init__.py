"""Context within the image, A_wi (Eq. 3): the schemes that the paper's Table 7 compares.

Each is a module from the backbone's last map (B, in_channels, h, w) to (B, out_channels, h, w);
ANN also takes the map before the last, and ISNet's context takes R and a prediction from R. They
are the published structures, including the convolution that fuses their result with the input, but
without the classifier.
"""

from mcibi_fast.nn.within_image.ann import ANN
from mcibi_fast.nn.within_image.apcnet import APCNet
from mcibi_fast.nn.within_image.aspp import ASPP
from mcibi_fast.nn.within_image.ccnet import CCNet
from mcibi_fast.nn.within_image.danet import DANet
from mcibi_fast.nn.within_image.dnl import DNL
from mcibi_fast.nn.within_image.isnet import ISNetContext
from mcibi_fast.nn.within_image.ppm import PPM

__all__ = ["ANN", "ASPP", "DNL", "PPM", "APCNet", "CCNet", "DANet", "ISNetContext"]
