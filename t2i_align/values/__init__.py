"""Value functions V(x_t, t, prompt): the expected final reward of a half-made image; for `vard`, `svdd` and `fk`."""

from t2i_align.values.value import Served, Value, ValueBlock, load_value

__all__ = ["Served", "Value", "ValueBlock", "load_value"]
