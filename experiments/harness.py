r"""Runs lm-eval's command line with the model `jaxq` known to it.

  python -m experiments.harness --model jaxq \
      --model_args path=out/w4,batch_size=8 --tasks mine --include_path tasks/

All arguments are lm-eval's (`--help` shows them). The keys of --model_args are
those of experiments.lm_eval_adapter.JaxqLM: path, batch_size, dtype, mesh,
max_length, max_gen_toks, add_bos_token, seed.
"""

import sys
from collections.abc import Callable

from experiments import interrupts


def command_line() -> Callable[[], None]:
  """lm-eval's own, after registering jaxq with it.

  Raises:
    ValueError: lm-eval is not installed.
  """
  try:
    from lm_eval import __main__ as lm_eval_main
    from lm_eval.api import registry

    from experiments import lm_eval_adapter
  except ImportError as e:
    raise ValueError(
      f'lm-eval cannot be imported ({e}); it is needed here. Install it with '
      "pip install 'jaxq[eval]'."
    ) from e
  registry.register_model('jaxq')(lm_eval_adapter.JaxqLM)
  return lm_eval_main.cli_evaluate


def main() -> None:
  """Runs it; a user's mistake is one line."""
  try:
    run = command_line()
    interrupts.end()
    run()
  except (ValueError, FileNotFoundError, NotImplementedError) as e:
    sys.exit(f'error: {e}')


if __name__ == '__main__':
  main()
