"""x"""
from dataclasses import dataclass
