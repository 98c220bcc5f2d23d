"""For processes of the fake engine: PyTorch takes longer to import than all else that they do, and computes nothing."""

import sys
from unittest.mock import MagicMock

torch = MagicMock()
torch.get_num_threads.return_value = 1
torch.cuda.is_available.return_value = torch.cuda.is_initialized.return_value = False
torch.cuda.device_count.return_value = 0
torch.version.cuda = None
sys.modules |= {"torch": torch, "torch.nn": torch.nn, "torch.nn.functional": torch.nn.functional}
