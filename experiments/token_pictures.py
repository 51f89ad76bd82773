"""Pictures of what a reducer kept: frames with their patches marked.

A dropped patch is covered. A patch that is in a slot of its own is left as it
is; patches that share one are framed in the slot's colour, the representative
twice as strong. The image is inside the SVG, so that a report is one file.
"""

import base64
import io
import pathlib
import re
from typing import Any

import numpy as np
import PIL.Image

from experiments import report_charts as charts
from experiments import report_html as parts
from experiments import results

FOLDER = 'tokens'  # Of a run folder: its pictures, NAME.svg.

_SCALE = 96  # Width and height of a frame at most, in the drawing's units.
_GAP = 8
_HUES = 12


def svg(
  frames: Any, assignment: Any, index: Any, grid: tuple[int, int, int]
) -> str:
  """One video (or image, T = 1) with its tokens.

  Args:
    frames: (T, height, width) or (T, height, width, 3), any range.
    assignment: (N,) slot of each token, -1: dropped; as of a Reduced.
    index: (K,) the slots' representatives, -1: none.
    grid: (T, rows, columns) of the tokens.

  Raises:
    ValueError: a grid that is not that of frames and tokens.
  """
  frames, assignment = np.asarray(frames), np.asarray(assignment)
  T, rows, columns = grid
  if frames.shape[0] != T or assignment.size != T * rows * columns:
    raise ValueError(
      f'token_pictures: grid={grid} for {frames.shape[0]} frames and '
      f'{assignment.size} tokens; frames * rows * columns must be the tokens. '
      'Pass the grid of these tokens.'
    )
  height, width = frames.shape[1:3]
  unit = _SCALE / max(height, width)
  h, w = height * unit, width * unit
  sizes = np.bincount(assignment[assignment >= 0], minlength=1)
  heads = set(np.asarray(index).tolist())
  body = []
  for t in range(T):
    left = t * (w + _GAP)
    body.append(
      f'<image x="{left:g}" y="0" width="{w:g}" height="{h:g}" '
      'preserveAspectRatio="none" style="image-rendering:pixelated" '
      f'href="{_data_uri(frames[t], frames)}"/>'
    )
    for r in range(rows):
      for c in range(columns):
        token = (t * rows + r) * columns + c
        body.append(
          _mark(
            left + c * w / columns,
            r * h / rows,
            w / columns,
            h / rows,
            int(assignment[token]),
            sizes,
            token in heads,
          )
        )
  kept = int((assignment >= 0).sum())
  label = f'{kept} of {assignment.size} tokens kept or merged'
  return (
    f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{label}" '
    f'viewBox="-1 -1 {T * (w + _GAP) - _GAP + 2:g} {h + 2:g}" '
    f'data-kept="{kept}" data-slots="{int((sizes > 0).sum())}">'
    + ''.join(body)
    + '</svg>'
  )


def save(folder: pathlib.Path, name: str, drawn: str) -> pathlib.Path:
  """Writes a picture where `section` finds it."""
  folder = folder / FOLDER
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / (re.sub(r'[^\w.=+-]+', '_', name) + '.svg')
  results.write_text(path, drawn + '\n')
  return path


def section(folder: pathlib.Path) -> str:
  """The report's section of the pictures in a run folder; '' without any."""
  figures = [
    f'<figure><figcaption>{charts.text(path.stem)}</figcaption>'
    f'{path.read_text("utf-8")}</figure>'
    for path in sorted((folder / FOLDER).glob('*.svg'))
  ]
  if not figures:
    return ''
  return parts.section(
    'Which tokens were kept?',
    'Covered patches were dropped; patches of one colour share a token.',
    parts.scroll(''.join(figures)),
  )


def _mark(
  x: float,
  y: float,
  width: float,
  height: float,
  slot: int,
  sizes: np.ndarray,
  is_head: bool,
) -> str:
  """What lies on a patch."""
  place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
  if slot < 0:
    return f'<rect {place} fill="#000" fill-opacity=".72" data-slot="-1"/>'
  if sizes[slot] < 2:
    return f'<rect {place} fill="none" data-slot="{slot}"/>'
  hue = slot * 360 // _HUES * 5 % 360  # Neighbours differ.
  return (
    f'<rect {place} fill="hsl({hue} 80% 50%)" stroke="hsl({hue} 90% 45%)" '
    f'fill-opacity="{".4" if is_head else ".2"}" data-slot="{slot}"/>'
  )


def _data_uri(frame: np.ndarray, all_frames: np.ndarray) -> str:
  """A frame as a PNG, with the contrast of the whole video."""
  low, high = float(all_frames.min()), float(all_frames.max())
  scaled = (frame - low) / max(high - low, 1e-9)
  image = PIL.Image.fromarray((scaled * 255).astype(np.uint8))
  data = io.BytesIO()
  image.save(data, 'PNG')
  return 'data:image/png;base64,' + base64.b64encode(data.getvalue()).decode()
