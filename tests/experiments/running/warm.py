"""What the process has done from which `forked.py` forks programs: what each of them would do again, in seconds."""

import gc
import threading

import pandas  # noqa: F401
import pytest
import scipy.special  # noqa: F401
import torch  # noqa: F401
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer  # noqa: F401

from experiments.config.compose import load_experiment, register
from experiments.records import sources
from experiments.running import sweep, tracking  # noqa: F401
from tests.experiments.hydra_files import read_once
from zipage.engine import replica_process  # noqa: F401
from zipage.parallel import rank  # noqa: F401

tqdm.set_lock(threading.RLock())  # its own is a semaphore, which stays behind where a process is killed
read_once(pytest.MonkeyPatch())
register()
load_experiment(["model=reasoner", "workload=word_problems", "hardware=cpu"])
sources._engine("zipage")

gc.collect()
gc.freeze()  # a child that looked for garbage among all these modules would copy their memory, too
gc.set_threshold(20_000, 20, 20)
