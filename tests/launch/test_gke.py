"""The JobSet is one that Kubernetes takes, and restarts what was taken away."""

import importlib
import pathlib
import tempfile
from unittest import mock

import yaml
from absl.testing import absltest, parameterized

from launch import gke
from tests.launch import fakes

VERSION = '1.33'  # Of Kubernetes: an older one than clusters have today.


def replicated(jobset):
  (found,) = jobset['spec']['replicatedJobs']
  return found


def pod(jobset):
  return replicated(jobset)['template']['spec']['template']['spec']


def not_in(known, given, at=''):
  """The fields of `given` that are lost on the way through an API's types."""
  if isinstance(given, dict):
    pairs = list(given.items())
  elif isinstance(given, list):
    pairs = list(enumerate(given))
    known = dict(enumerate(known))
  else:
    return [] if given == known else [at]
  lost = []
  for key, value in pairs:
    path = f'{at}.{key}'.lstrip('.')
    lost += not_in(known[key], value, path) if key in known else [path]
  return lost


class RenderTest(parameterized.TestCase):
  @parameterized.product(
    name=('v5e:1x1', 'v5e:4x4', 'tpu7x:2x2x1', 'h100:8', 'h100:16'),
    queue=('', 'team'),
    spot=(False, True),
  )
  def test_the_apis_of_kubernetes_and_jobset_have_it(self, name, queue, spot):
    kubernetes, published = self.schemas()
    jobset = gke.render(fakes.job(name), queue=queue, spot=spot)
    jobset = yaml.safe_load(gke.dump(jobset))
    self.assertEqual(not_in(published.from_dict(jobset).to_dict(), jobset), [])
    job = {
      'apiVersion': 'batch/v1',
      'kind': 'Job',
      'metadata': jobset['metadata'],
      **replicated(jobset)['template'],
    }
    kubernetes.validate(job, VERSION, strict=True)

  def test_the_apis_refuse_what_is_not_in_them(self):
    kubernetes, published = self.schemas()
    jobset = gke.render(fakes.job())
    template = replicated(jobset)['template']
    job = {'apiVersion': 'batch/v1', 'kind': 'Job', 'metadata': {'name': 'a'}}
    template['spec']['backofLimit'] = 1
    with self.assertRaises(kubernetes.ValidationError):
      kubernetes.validate({**job, **template}, VERSION, strict=True)
    policy = jobset['spec']['failurePolicy']
    policy['maxRestart'] = 1
    self.assertEqual(
      not_in(published.from_dict(jobset).to_dict(), jobset),
      [
        'spec.failurePolicy.maxRestart',
        'spec.replicatedJobs.0.template.spec.backofLimit',
      ],
    )
    policy['maxRestarts'] = '3'
    with self.assertRaisesRegex(ValueError, 'valid integer'):
      published.from_dict(jobset)

  def schemas(self):
    """kubernetes-validate, and the published type of a JobSet."""
    try:
      return (
        importlib.import_module('kubernetes_validate'),
        importlib.import_module(
          'kubeflow_trainer_api.models'
        ).JobsetV1alpha2JobSet,
      )
    except ModuleNotFoundError as e:
      self.skipTest(f'{e.name} is not installed')

  def test_a_pod_per_host_with_all_its_chips(self):
    jobset = gke.render(fakes.job())
    spec = replicated(jobset)['template']['spec']
    self.assertEqual((spec['completions'], spec['parallelism']), (4, 4))
    (container,) = pod(jobset)['containers']
    self.assertEqual(container['resources']['limits'], {'google.com/tpu': 4})
    self.assertEqual(
      container['command'] + container['args'], list(fakes.job().command)
    )
    self.assertEqual(
      pod(jobset)['nodeSelector'],
      {
        'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
        'cloud.google.com/gke-tpu-topology': '4x4',
      },
    )

  def test_gpu_hosts_are_told_who_is_who(self):
    (container,) = pod(gke.render(fakes.job('h100:16')))['containers']
    self.assertEqual(
      container['args'][-3:],
      [
        '--coordinator_address=smollm2-w4-hosts-0-0.smollm2-w4:8476',
        '--num_processes=2',
        '--process_id=$(HOST_INDEX)',
      ],
    )
    (container,) = pod(gke.render(fakes.job('h100:8')))['containers']
    self.assertEqual(container['args'], list(fakes.job().command[3:]))

  def test_a_pod_that_is_taken_away_costs_no_restart(self):
    jobset = gke.render(fakes.job())
    (rule,) = jobset['spec']['failurePolicy']['rules']
    self.assertEqual(rule['action'], 'RestartJobSetAndIgnoreMaxRestarts')
    spec = replicated(jobset)['template']['spec']
    (pattern,) = spec['podFailurePolicy']['rules'][0]['onPodConditions']
    self.assertEqual(pattern['type'], 'DisruptionTarget')
    self.assertEqual(jobset['spec']['failurePolicy']['maxRestarts'], 3)
    self.assertEqual(pod(jobset)['terminationGracePeriodSeconds'], 55)

  def test_the_bucket_is_mounted_where_the_output_goes(self):
    spec = pod(gke.render(fakes.job()))
    (volume,) = spec['volumes']
    self.assertEqual(
      volume['csi']['volumeAttributes']['bucketName'], 'my-bucket'
    )
    (mount,) = spec['containers'][0]['volumeMounts']
    self.assertIn(f'--output={mount["mountPath"]}/', fakes.job().command[-1])

  def test_the_queue_is_a_label_and_may_be_left_out(self):
    labels = gke.render(fakes.job(), queue='team')['metadata']['labels']
    self.assertEqual(labels, {'kueue.x-k8s.io/queue-name': 'team'})
    self.assertNotIn('labels', gke.render(fakes.job())['metadata'])


class ApplyTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.tools = fakes.Tools(pathlib.Path(folder.name))
    self.enterContext(mock.patch.dict('os.environ', self.tools.env()))

  @parameterized.parameters(
    ('', ['get', 'apply']),
    ('Completed', ['get', 'apply']),
    ('Failed', ['get', 'delete', 'apply']),
  )
  def test_only_a_failed_one_starts_afresh(self, state, verbs):
    self.tools.add(
      'kubectl',
      f'case "$1" in get) echo -n {state} ;; apply) cat >applied ;; esac',
    )
    jobset = gke.render(fakes.job())
    gke.apply(jobset)
    self.assertEqual([c.split()[1] for c in self.tools.calls], verbs)
    applied = self.tools.folder / 'applied'
    self.assertEqual(yaml.safe_load(applied.read_text()), jobset)

  def test_a_refusal_ends_it(self):
    self.tools.add('kubectl', 'echo "no such cluster" >&2; exit 3')
    with self.assertRaisesRegex(OSError, 'kubectl ended with exit code 3; its'):
      gke.apply(gke.render(fakes.job()))


if __name__ == '__main__':
  absltest.main()
