"""Headless Chromium over its debugging pipe: open a page, ask it, look at it.

No package is needed, only the browser: `apt-get install chromium`, or
$JAXQ_CHROMIUM names one. Messages are JSON ended by a zero byte, on the file
descriptors 3 and 4 of the browser.
"""

import base64
import json
import os
import pathlib
import select
import shutil
import subprocess
import tempfile
import time
from typing import Any

_NAMES = (
  'chromium',
  'chromium-browser',
  'google-chrome',
  'google-chrome-stable',
  'chrome',
  'chrome-headless-shell',
)


def find() -> str | None:
  """Path of a browser, or None."""
  names = [os.environ.get('JAXQ_CHROMIUM') or '', *_NAMES]
  return next((found for name in names if (found := shutil.which(name))), None)


class Browser:
  """One page of a headless Chromium; a context manager.

  Attributes:
    requests: URLs that the page asked for, itself included.
    errors: what its scripts threw or logged as errors.
  """

  def __init__(self, path: str):
    self.requests: list[str] = []
    self.errors: list[str] = []
    self._path = path
    self._count = 0
    self._session: str | None = None
    self._rest = b''

  def __enter__(self) -> 'Browser':
    self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    to_browser, self._write = os.pipe()
    self._read, from_browser = os.pipe()
    # Through a shell, since Popen cannot choose numbers: 3 is read, 4 written.
    command = ' '.join(
      [
        'exec "$0" --headless=new --remote-debugging-pipe --no-sandbox',
        '--disable-gpu --disable-dev-shm-usage --no-first-run',
        '--hide-scrollbars',
        '--disable-background-networking --disable-component-update',
        f'--user-data-dir={self._folder.name} about:blank',
        f'3<&{to_browser} 4>&{from_browser}',
      ]
    )
    self._process = subprocess.Popen(
      ['bash', '-c', command, self._path],
      pass_fds=(to_browser, from_browser),
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    target = self._call('Target.createTarget', url='about:blank')['targetId']
    self._session = self._call(
      'Target.attachToTarget', targetId=target, flatten=True
    )['sessionId']
    for domain in ('Page', 'Runtime', 'Network', 'Log'):
      self._call(f'{domain}.enable')
    return self

  def __exit__(self, *error: object) -> None:
    os.close(self._write)  # It ends when nobody talks to it.
    try:
      self._process.wait(timeout=10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    os.close(self._read)
    self._folder.cleanup()

  def open(
    self, page: pathlib.Path, width: int = 1200, scheme: str = 'light'
  ) -> None:
    """Opens a local page in a window of that width; scheme: light or dark."""
    self._call(
      'Emulation.setEmulatedMedia',
      features=[{'name': 'prefers-color-scheme', 'value': scheme}],
    )
    self._call(
      'Emulation.setDeviceMetricsOverride',
      width=width,
      height=900,
      deviceScaleFactor=1,
      mobile=False,
    )
    self._call('Page.navigate', url=page.resolve().as_uri())
    deadline = time.monotonic() + 20
    while (
      self.ask('document.readyState') != 'complete'
      or self.ask('location.href') != page.resolve().as_uri()
    ):
      if time.monotonic() > deadline:
        raise TimeoutError(f'{page} does not load')
      time.sleep(0.05)

  def ask(self, expression: str) -> Any:
    """The JSON value of a JavaScript expression."""
    answer = self._call(
      'Runtime.evaluate', expression=expression, returnByValue=True
    )
    if 'exceptionDetails' in answer:
      raise ValueError(f'{expression}: {answer["exceptionDetails"]}')
    return answer['result'].get('value')

  def move(self, x: float, y: float) -> None:
    """Moves the pointer."""
    self._call('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)

  def screenshot(self, path: pathlib.Path) -> None:
    """A PNG of the whole page."""
    data = self._call(
      'Page.captureScreenshot', format='png', captureBeyondViewport=True
    )
    path.write_bytes(base64.b64decode(data['data']))

  def _call(self, method: str, **params: Any) -> dict[str, Any]:
    """Sends a command and returns its result; keeps events met meanwhile."""
    self._count += 1
    message = {'id': self._count, 'method': method, 'params': params}
    if self._session is not None:
      message['sessionId'] = self._session
    os.write(self._write, json.dumps(message).encode() + b'\0')
    while True:
      answer = self._receive()
      if answer.get('id') == self._count:
        if 'error' in answer:
          raise ValueError(f'{method}: {answer["error"]}')
        return answer['result']
      self._event(answer)

  def _receive(self) -> dict[str, Any]:
    while b'\0' not in self._rest:
      if not select.select([self._read], [], [], 60)[0]:
        raise TimeoutError('the browser does not answer')
      chunk = os.read(self._read, 1 << 20)
      if not chunk:
        raise OSError('the browser ended')
      self._rest += chunk
    message, _, self._rest = self._rest.partition(b'\0')
    return json.loads(message)

  def _event(self, message: dict[str, Any]) -> None:
    name, params = message.get('method'), message.get('params', {})
    if name == 'Network.requestWillBeSent':
      self.requests.append(params['request']['url'])
    elif name == 'Runtime.exceptionThrown':
      self.errors.append(str(params['exceptionDetails']))
    elif name == 'Log.entryAdded' and params['entry']['level'] == 'error':
      self.errors.append(params['entry']['text'])
