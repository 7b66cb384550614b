"""A script: llama.cpp's converter of models, with the tokenizer of an existing GGUF file.

The converter recognizes a tokenizer by a hash of what it makes of a text, and refuses unknown ones, such as those that
transformers made from a GGUF file. The tokenizer's entries of such a file can be copied.

    python -P convert_with_tokenizer.py CONVERTERS MODEL_DIRECTORY FILE OUTTYPE TOKENIZER_FILE
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_TEMPLATE = "tokenizer.chat_template"


def convert(converters: Path, directory: Path, file: Path, outtype: str, tokenizer: Path) -> None:
    """Convert a model directory. Arguments as in `gguf.convert_model`."""
    sys.path[:0] = [str(converters), str(converters / "gguf-py")]
    gguf, conversion = import_module("gguf"), import_module("conversion")
    hparams = conversion.ModelBase.load_hparams(directory, False)
    kind: Any = conversion.get_model_class(conversion.get_model_architecture(hparams, conversion.ModelType.TEXT))
    fields = gguf.GGUFReader(tokenizer).fields

    class WithTokenizer(kind):
        """The converter of this architecture, with another tokenizer."""

        model_arch = kind.model_arch

        def set_vocab(self) -> None:
            """Copy the tokenizer of the GGUF file, and write the chat template of the directory."""
            template = directory / "chat_template.jinja"
            if template.is_file():
                self.gguf_writer.add_chat_template(template.read_text(encoding="utf-8"))
            for name, field in fields.items():
                if name.startswith("tokenizer.") and name != _TEMPLATE:
                    inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                    self.gguf_writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)

    import_module("torch").set_grad_enabled(False)
    WithTokenizer(directory, getattr(gguf.LlamaFileType, _TYPES[outtype]), file).write()


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))
