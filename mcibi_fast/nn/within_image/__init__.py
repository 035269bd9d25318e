"""Context within the image, A_wi (Eq. 3): that of the frameworks that the paper compares.

Each is a module from the backbone's last map (B, in_channels, h, w) to (B, out_channels, h, w);
ANN also takes the map before the last, and the contexts of ISNet and OCRNet take R and a first
prediction. They are the published structures, including the convolution that fuses their result
with the input, but without the classifier.
"""

from mcibi_fast.nn.within_image.ann import ANN
from mcibi_fast.nn.within_image.apcnet import APCNet
from mcibi_fast.nn.within_image.aspp import ASPP
from mcibi_fast.nn.within_image.attended import AttendedContext
from mcibi_fast.nn.within_image.ccnet import CCNet
from mcibi_fast.nn.within_image.danet import DANet
from mcibi_fast.nn.within_image.dmnet import DMNet
from mcibi_fast.nn.within_image.dnl import DNL
from mcibi_fast.nn.within_image.emanet import EMANet
from mcibi_fast.nn.within_image.encnet import EncNet
from mcibi_fast.nn.within_image.gcnet import GCNet
from mcibi_fast.nn.within_image.isanet import ISANet
from mcibi_fast.nn.within_image.isnet import ISNetContext
from mcibi_fast.nn.within_image.nonlocalnet import NonLocal
from mcibi_fast.nn.within_image.ocrnet import ObjectContext
from mcibi_fast.nn.within_image.ppm import PPM
from mcibi_fast.nn.within_image.psanet import PSANet

__all__ = [
    "ANN",
    "ASPP",
    "DNL",
    "PPM",
    "APCNet",
    "AttendedContext",
    "CCNet",
    "DANet",
    "DMNet",
    "EMANet",
    "EncNet",
    "GCNet",
    "ISANet",
    "ISNetContext",
    "NonLocal",
    "ObjectContext",
    "PSANet",
]
