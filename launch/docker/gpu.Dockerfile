# jaxq on GPU hosts. From the root of the repository:
#
#   docker build -f launch/docker/gpu.Dockerfile -t REGISTRY/jaxq:1 .
#   docker push REGISTRY/jaxq:1
#
# The wheels that JAX asks for hold CUDA; the host needs its driver and the
# NVIDIA container runtime.
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    JAX_PLATFORMS=cuda,cpu \
    # What the NVIDIA runtime is to hand in, and where GKE puts the driver.
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64

WORKDIR /jaxq
# First what changes seldom: the dependencies are a layer of their own.
COPY pyproject.toml README.md LICENSE ./
COPY jaxq/__init__.py jaxq/
RUN pip install '.[gpu,demo,tensorboard]' && pip uninstall -y jaxq

COPY jaxq jaxq
COPY models models
COPY pallas_kernels pallas_kernels
COPY experiments experiments
COPY launch launch
RUN pip install --no-deps --editable .

# A process that is told to stop (SIGTERM) saves and ends: no shell in between.
CMD ["python", "-m", "experiments.calibrate", "--help"]
