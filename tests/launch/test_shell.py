"""Shell text from Python says what Python meant."""

import subprocess

from absl.testing import absltest

from launch import shell


class ShellTest(absltest.TestCase):
  def test_bash_reads_back_every_word(self):
    words = ['printf', r'%s\n', "it's", '--a=x y', '--b=$HOME', '*', '']
    out = subprocess.run(
      ['bash', '-c', shell.lines(words)], capture_output=True, text=True
    ).stdout
    self.assertEqual(out.split('\n')[:-1], words[2:])

  def test_flags_stand_on_lines_of_their_own(self):
    text = shell.lines(['tool', 'do', '--a=1', '--b=2'], 4)
    self.assertEqual(text, 'tool do \\\n    --a=1 \\\n    --b=2')

  def test_values_are_put_in_once(self):
    self.assertEqual(shell.fill('@A@ @@B@', A='@B@', B='2'), '@B@ @2')

  def test_a_hole_without_a_value_is_named(self):
    with self.assertRaisesRegex(ValueError, r"holes \['A'\].*given \['B'\]"):
      shell.fill('@A@', B='1')


if __name__ == '__main__':
  absltest.main()
