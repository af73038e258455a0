"""Where tests and their tools import from: a test that is also a command finds tests/tools by importing this"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT/'tests/tools')]
