"""The small MosaicQA model that tests of training share."""

from experiments import training
from jaxq.data import mosaic
from models import vision_language

DATA = mosaic.MosaicConfig(
  frames=2, rows=2, columns=2, min_digits=1, questions_per_sample=4
)
MODEL = training.fit(
  DATA,
  vision_language.VisionLanguageConfig(
    patch_size=8,
    vision_size=16,
    vision_layers=1,
    vision_heads=2,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    mlp_ratio=2,
  ),
)
