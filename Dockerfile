# The app in a container. For a GPU, run it with `--gpus all`: torch's wheel brings its own CUDA.
#
#   docker build -t gpt-oss-app .
#   docker run --gpus all -p 7860:7860 -v gpt-oss-data:/data gpt-oss-app
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install -y --no-install-recommends git git-lfs openssh-client gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# An ordinary user: nothing here needs root, and weights from strangers are read.
RUN useradd --create-home --uid 1000 app && mkdir /data && chown app /data
WORKDIR /app

# First what changes seldom, so that a change of the code does not install everything again.
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt

COPY --chown=app . .
USER app

# Weights, keys and conversations live in the volume, not in the image.
ENV WORK_DIR=/data HOST=0.0.0.0 PORT=7860
VOLUME /data
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s \
    CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/health', timeout=4)"
# SIGTERM ends running answers in order (within 10 s).
CMD ["python", "app.py"]
