"""The pipeline: profiles, stages, and the commands that run them. Needs the extra `pipeline`."""
from ..core import need

need("papermill", "pipeline")
need("dvc", "pipeline")
