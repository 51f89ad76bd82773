"""A Job is checked before anything is rendered from it."""

import pathlib
import tempfile

from absl.testing import absltest, parameterized

from launch import job as job_lib
from tests.launch import fakes

FLAGS = pathlib.Path(__file__).resolve().parents[2] / 'experiments' / 'flags'


class JobTest(parameterized.TestCase):
  def test_the_output_is_in_the_mounted_bucket(self):
    command = fakes.job().command
    self.assertEqual(command[:3], ('python', '-m', 'experiments.calibrate'))
    self.assertEqual(command[3:-2], fakes.ARGUMENTS)
    self.assertEqual(command[-2], '--grace_seconds=25')
    self.assertEqual(command[-1], '--output=/bucket/runs/smollm2-w4')

  def test_the_output_of_the_flagfile_gives_way(self):
    job = fakes.job(arguments=('--output=out/a', '--model=b'))
    self.assertEqual(job.command[3], '--model=b')
    with self.assertRaisesRegex(ValueError, 'output=c: the output is --bucket'):
      job_lib.read_flagfile(
        str(FLAGS / 'smollm2_w4a16_gptq.flags'), ['output=c']
      )

  @parameterized.parameters(
    ('gs://my-bucket', '/bucket'),
    ('gs://my-bucket/', '/bucket'),
    ('gs://my-bucket/a/b/', '/bucket/a/b'),
    ('/shared/runs/', '/shared/runs'),
  )
  def test_folder(self, bucket, folder):
    self.assertEqual(fakes.job(bucket=bucket).folder, folder)

  def test_an_entry_point_without_output_is_given_none(self):
    command = fakes.job(entry_point='generate').command
    self.assertEqual(command[3:-1], fakes.ARGUMENTS)
    self.assertNotIn('--output', ' '.join(command))

  @parameterized.parameters(*job_lib.ENTRY_POINTS)
  def test_entry_points_have_the_flag_they_are_sent(self, name):
    source = FLAGS.parent.joinpath(f'{name}.py').read_text()
    sent = job_lib.ENTRY_POINTS[name] is not None
    self.assertEqual("'output'" in source, sent)

  def test_the_digest_follows_the_flags(self):
    same, other = fakes.job(), fakes.job(arguments=('--model=x',))
    self.assertEqual(same.digest, fakes.job(max_restarts=9).digest)
    self.assertNotEqual(same.digest, other.digest)

  @parameterized.parameters(
    (dict(name='Llama_3'), r'--name=Llama_3: allowed are at most 40'),
    (dict(entry_point='train'), r"train; allowed \['calibrate', 'evaluate'"),
    (dict(image='a image'), r'--image=a image: not the name of an image'),
    (dict(bucket='my-bucket'), r'--bucket=my-bucket: allowed is gs://BUCKET'),
    (dict(bucket='gs://B'), r'--bucket=gs://B: allowed is gs://BUCKET'),
    (dict(bucket='gs://my-bucket/a b'), r'a b: allowed is gs://BUCKET'),
    (dict(max_restarts=-1), r'--max_restarts=-1; it must be at least 0'),
    (dict(stop_seconds=0), r'--stop_seconds=0; it must be at least 1'),
    (
      dict(arguments=('--mesh=data:2', '--mesh=data:2,model:4')),
      r'--mesh=data:2,model:4 has 8 devices and v5e:4x4 has 16; give',
    ),
  )
  def test_what_is_wrong_is_named(self, fields, message):
    with self.assertRaisesRegex(ValueError, message):
      fakes.job(**fields)

  def test_a_mesh_of_all_devices_is_taken(self):
    arguments = ('--mesh=data:2, model:4',)
    job = fakes.job('tpu7x:2x2x1', arguments=arguments)
    self.assertEqual(job.arguments, arguments)

  def test_launchers_of_the_cloud_need_an_image_and_a_bucket(self):
    with self.assertRaisesRegex(ValueError, r'--image not given; launch.gke'):
      job_lib.require(fakes.job(image=''), 'gke', kind='any')
    with self.assertRaisesRegex(ValueError, r'/runs: launch.gke needs gs://'):
      job_lib.require(fakes.job(bucket='/runs'), 'gke', kind='any')
    with self.assertRaisesRegex(NotImplementedError, 'h100:8: launch.xpk is f'):
      job_lib.require(fakes.job('h100:8'), 'xpk', kind='tpu')


class FlagfileTest(parameterized.TestCase):
  def test_included_files_and_overrides_are_expanded_in_order(self):
    with tempfile.TemporaryDirectory() as folder:
      base = pathlib.Path(folder) / 'base.flags'
      base.write_text('# A comment.\n--model=a\n')
      path = pathlib.Path(folder) / 'job.flags'
      path.write_text(f'--flagfile={base}\n\n--group_size=64\n')
      self.assertEqual(
        job_lib.read_flagfile(str(path), ['model=b']),
        ('--model=a', '--group_size=64', '--model=b'),
      )

  def test_every_flagfile_of_the_repository_can_be_sent(self):
    for path in sorted(FLAGS.glob('*.flags')):
      arguments = job_lib.read_flagfile(str(path))
      self.assertTrue(all(a.startswith('--') for a in arguments), path.name)

  @parameterized.parameters(
    ('', '--job not given; a flagfile of the entry point is needed'),
    ('none.flags', '--job=none.flags: no such file; a flagfile'),
  )
  def test_a_missing_flagfile(self, path, message):
    with self.assertRaisesRegex(FileNotFoundError, message):
      job_lib.read_flagfile(path)

  @parameterized.parameters('mesh', '--mesh=data:2', 'mesh data')
  def test_an_override_that_cannot_be_read(self, text):
    path = str(FLAGS / 'smollm2_w4a16_gptq.flags')
    with self.assertRaisesRegex(ValueError, f'--override={text}; it reads NAM'):
      job_lib.read_flagfile(path, [text])

  def test_a_flagfile_that_includes_a_missing_one(self):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'job.flags'
      path.write_text('--flagfile=/none.flags\n')
      with self.assertRaisesRegex(ValueError, 'job.flags: .*mend the flagfile'):
        job_lib.read_flagfile(str(path))


class CheckTest(absltest.TestCase):
  def test_the_entry_point_looks_at_its_flags(self):
    path = str(FLAGS / 'smollm2_w4a16_gptq.flags')
    job_lib.check_arguments(fakes.job(arguments=job_lib.read_flagfile(path)))

  def test_a_misspelt_flag_is_found_before_the_queue(self):
    job = fakes.job(arguments=('--model=a', '--grup_size=64'))
    message = 'calibrate refuses its flags: unknown flag --grup_size; did you'
    with self.assertRaisesRegex(ValueError, message):
      job_lib.check_arguments(job)


if __name__ == '__main__':
  absltest.main()
