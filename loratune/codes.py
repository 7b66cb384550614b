"""The stable codes of everything that can be wrong; loratune/README.md has the table, which is written from here."""

from enum import StrEnum


class Code(StrEnum):
    """The stable name of each kind of problem, for scripts and tests: wording may change, a code may not.

    A member is its code; `meaning` says in one sentence when it is reported. A code without an area, such as
    `interrupted`, is a word of the message itself, and is not printed once more.
    """

    meaning: str

    def __new__(cls, value: str, meaning: str = "") -> "Code":
        """A member from its code and its meaning."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    UNEXPECTED = "unexpected", "An error that loratune has no code for; please report it."

    # Command line, configuration, console (usage.*, config.*, output.*)
    INTERRUPTED = "interrupted", "The user stopped the command with Ctrl-C."
    TERMINATED = "terminated", "A signal other than Ctrl-C asked the command to end."
    USAGE_CONFLICT = "usage.conflict", "Two options or arguments cannot be given together, or exactly one is needed."
    USAGE_NEEDS_OPTION = "usage.needs_option", "An option only works together with another one."
    USAGE_NOT_FOR_ADAPTERS = "usage.not_for_adapters", "An option has no meaning for an adapter directory."
    USAGE_BAD_PATH = "usage.bad_path", "The value of an option is not a path, or leads to something else."
    USAGE_OUT_OF_RANGE = "usage.out_of_range", "The value of an option is outside its range."
    USAGE_NO_PROMPT = "usage.no_prompt", "There is no prompt as an argument, in a file, or on stdin."
    USAGE_NOT_UTF8 = "usage.not_utf8", "A prompt is not UTF-8."
    USAGE_SEVERAL_PROCESSES = "usage.several_processes", "A launcher started a command that is for one process."
    USAGE_ADAPTER_NAME = "usage.adapter_name", "A name for an adapter is none, or is no adapter of this command."
    USAGE_ADAPTER_TWICE = "usage.adapter_twice", "Two adapters of a command have one name, or one directory."
    USAGE_BAD_MIX = "usage.bad_mix", "The value of --mix is not a list of adapters with weights."
    USAGE_BAD_METRIC = "usage.bad_metric", "A metric is none, or its regular expression is none or takes too long."
    USAGE_BAD_REQUIREMENT = "usage.bad_requirement", "A requirement is none, or is about a figure that there is not."
    USAGE_MISSING_PACKAGE = "usage.missing_package", "An option needs a package that is not installed."
    CONFIG_UNREADABLE = "config.unreadable", "The config file cannot be read."
    CONFIG_NOT_A_FILE = "config.not_a_file", "A directory or pipe is given in place of a config file."
    CONFIG_TOO_LARGE = "config.too_large", "The file is too large to be a config file."
    CONFIG_EMPTY_FILE = "config.empty_file", "The config file has no content."
    CONFIG_NOT_UTF8 = "config.not_utf8", "The config file is not UTF-8."
    CONFIG_SYNTAX = "config.syntax", "The config file, or a value of --set, is not valid YAML."
    CONFIG_NOT_A_MAPPING = "config.not_a_mapping", "The config file is not a mapping of sections."
    CONFIG_YAML_ALIAS = "config.yaml_alias", "The config file has a YAML alias."
    CONFIG_YAML_TAG = "config.yaml_tag", "The config file has a YAML tag."
    CONFIG_TOO_DEEP = "config.too_deep", "The config file is nested too deeply."
    CONFIG_BAD_KEY = "config.bad_key", "A key is not a plain word."
    CONFIG_DUPLICATE_KEY = "config.duplicate_key", "A key is written twice."
    CONFIG_AMBIGUOUS_VALUE = "config.ambiguous_value", "YAML readers disagree on what a value means."
    CONFIG_MORE_PROBLEMS = "config.more_problems", "There are more problems than are shown."
    CONFIG_BAD_ASSIGNMENT = "config.bad_assignment", "An argument of --set is not section.key=value."
    CONFIG_NOTHING_TO_REMOVE = "config.nothing_to_remove", "--set removes a key that the config does not have."
    CONFIG_UNKNOWN_KEY = "config.unknown_key", "There is no such key."
    CONFIG_MISSING_KEY = "config.missing_key", "A key without a default is missing."
    CONFIG_WRONG_TYPE = "config.wrong_type", "A value is of the wrong type."
    CONFIG_NOT_A_CHOICE = "config.not_a_choice", "A value is none of the allowed ones."
    CONFIG_EMPTY_VALUE = "config.empty_value", "A text or list is empty."
    CONFIG_OUT_OF_RANGE = "config.out_of_range", "A number is outside its range, or not finite."
    CONFIG_NOT_A_PATH = "config.not_a_path", "A value cannot be a path."
    CONFIG_NOT_A_FRACTION = "config.not_a_fraction", "A fraction does not lie between 0 and 1."
    CONFIG_BAD_PATTERN = "config.bad_pattern", "A regular expression of the config is none, or is too large."
    CONFIG_UNPINNED_CODE = "config.unpinned_code", "Code from a repository is trusted without a pinned revision."
    CONFIG_GGUF_QUANTIZED = "config.gguf_quantized", "A GGUF file is to be quantized again."
    CONFIG_RANDOM_INIT = "config.random_init", "The adapter would not start from zero."
    CONFIG_ODD_RANK = "config.odd_rank", "Orthogonal initialization needs an even rank."
    CONFIG_LORA_VARIANTS = "config.lora_variants", "Two variants of LoRA do not work together."
    CONFIG_LORAFA_OPTIMIZER = "config.lorafa_optimizer", "LoRA-FA has an optimizer of its own."
    CONFIG_INIT_QUANTIZATION = "config.init_quantization", "An initialization does not fit the base's quantization."
    CONFIG_UNKNOWN_COLUMN = "config.unknown_column", "A row has no field of this name."
    CONFIG_COLUMN_TWICE = "config.column_twice", "One column of the data is given for two fields."
    CONFIG_SOURCE_WEIGHTS = "config.source_weights", "Some sources have a weight and some have none, or one has one."
    CONFIG_FORMAT_WITHOUT_CHAT = "config.format_without_chat", "A key for chats is set for a format without chats."
    CONFIG_SHARED_PREFIXES = "config.shared_prefixes", "Shared prefixes cannot be computed once with another setting."
    CONFIG_NO_STEPS = "config.no_steps", "The run would have no steps."
    CONFIG_LENGTH_TWICE = "config.length_twice", "Two keys set the length of the run."
    CONFIG_BUDGET_TOO_SHORT = "config.budget_too_short", "`max_minutes` has no room for a few steps."
    CONFIG_AUTO_RATE = "config.auto_rate", "There is no formula for the learning rate of this optimizer."
    CONFIG_AUTO_RANK = "config.auto_rank", "The rank is left to the rows, and the command reads none."
    CONFIG_WARMUP_NOT_WHOLE = "config.warmup_not_whole", "A number of warmup steps is not a whole number."
    CONFIG_WARMUP_TOO_LONG = "config.warmup_too_long", "The warmup is longer than the run."
    CONFIG_CONSTANT_WARMUP = "config.constant_warmup", "The constant schedule has no warmup."
    CONFIG_NO_EVALUATION_ROWS = "config.no_evaluation_rows", "Evaluations are configured without rows for them."
    CONFIG_GROUPS_NOT_DIVIDED = "config.groups_not_divided", "Groups of rows are named, and no fraction is held out."
    CONFIG_OBJECTIVE = "config.objective", "A setting does not go with the objective of the training."
    CONFIG_REPLAY = "config.replay", "Rows of an earlier run are to be replayed, and the run starts from no adapter."
    CONFIG_SEVERAL_PROCESSES = "config.several_processes", "A key is for one process, and several were started."
    CONFIG_ADAPTER_VALUE = "config.adapter_value", "A value of an adapter's configuration is of the wrong type."
    CONFIG_ADAPTER_PATTERN = "config.adapter_pattern", "A pattern of an adapter is none, or takes too long to match."
    CONFIG_ADAPTER_TOO_MANY = "config.adapter_too_many", "An adapter's configuration has more entries than modules."
    CONFIG_ADAPTER_RANK = "config.adapter_rank", "The rank in an adapter's configuration is not that of its tensors."
    OUTPUT_FULL = "output.full", "The disk is full that standard output is written to."
    OUTPUT_FAILED = "output.failed", "Standard output cannot be written."

    # Sweeps (sweep.*)
    SWEEP_BAD_GRID = "sweep.bad_grid", "An argument of --grid is neither key=VALUE,VALUE nor key=LOW..HIGH."
    SWEEP_KEY = "sweep.key", "A key is one that trials of a study cannot differ in."
    SWEEP_TOO_MANY = "sweep.too_many", "A grid has too many combinations to try."
    SWEEP_NO_END = "sweep.no_end", "A sweep over ranges has neither a number of trials nor a budget."
    SWEEP_NO_VALIDATION = "sweep.no_validation", "A sweep has no validation rows by which trials could be compared."
    SWEEP_NO_OPTUNA = "sweep.no_optuna", "The package that keeps a study and draws from ranges is not installed."
    SWEEP_BUDGET = "sweep.budget", "The budget of a sweep is shorter than one trial."
    SWEEP_OTHER_STUDY = "sweep.other_study", "The study is of another config, other rows or another base."
    SWEEP_STORAGE = "sweep.storage", "The storage of a study cannot be opened, read or written."
    SWEEP_NO_STUDY = "sweep.no_study", "The directory holds no results of a study."
    SWEEP_ALL_FAILED = "sweep.all_failed", "Every trial of a study diverged, or did worse than the base."
    SWEEP_WINNER_MISSING = (
        "sweep.winner_missing",
        "The adapter of the best trial of a study is missing or damaged.",
    )

    # System (system.*)
    SYSTEM_OUT_OF_MEMORY = "system.out_of_memory", "The process ran out of memory."
    SYSTEM_CALL_FAILED = "system.call_failed", "The operating system refused to read or write a file."
    SYSTEM_DISK_TOO_SMALL = "system.disk_too_small", "The disk has too little room for what a run will write."
    SYSTEM_DISK_FULL = "system.disk_full", "The disk, a quota, or the limit of a file's size ran out during a write."
    SYSTEM_LOCKED = "system.locked", "Another run is using the same directory or database."

    # Kernels (kernel.*)
    KERNEL_NO_LIGER = "kernel.no_liger", "Liger has no kernels for the family of the model."
    KERNEL_NO_LAYERS = "kernel.no_layers", "The model does not name its layers, so they cannot be compiled."

    # Data: sources and formats (data.*)

    DATA_FILE_NOT_FOUND = "data.file_not_found", "A data path names nothing that exists."
    DATA_NO_FILES = "data.no_files", "A directory or a glob holds no file of a type that is read."
    DATA_NOT_A_FILE = "data.not_a_file", "A data path is neither a file nor a directory, such as a pipe."
    DATA_FILE_UNREADABLE = "data.file_unreadable", "The operating system refuses to read a data file."
    DATA_FILE_TYPE = "data.file_type", "A data file has an ending that is not read."
    DATA_FILE_DAMAGED = "data.file_damaged", "A gzip or Parquet file cannot be unpacked."
    DATA_FILE_CHANGED = "data.file_changed", "A data file changed between the check of its rows and their use."
    DATA_SPLIT = "data.split", "`split` is not a slice that can be taken of a local source."
    DATA_NO_ROWS = "data.no_rows", "A source has no rows, or none in its split."
    DATA_HUB_ID = "data.hub_id", "A path is neither a file nor a valid id of a hub dataset."
    DATA_HUB_UNREACHABLE = "data.hub_unreachable", "The hub does not answer, and the dataset is not in the cache."
    DATA_HUB_LOADING = "data.hub_loading", "A hub dataset cannot be loaded."
    DATA_ENCODING = "data.encoding", "A data file holds bytes that are not UTF-8."
    DATA_MORE_PROBLEMS = (
        "data.more_problems",
        "As many problems of rows are shown as are told at once; there may be more.",
    )
    DATA_JSON = "data.json", "A row or document is not valid JSON."
    DATA_JSON_CUT_OFF = "data.json_cut_off", "A row or document ends in the middle of a JSON value."
    DATA_JSON_DEPTH = "data.json_depth", "JSON is nested more deeply than it can be read."
    DATA_JSON_DUPLICATE_KEY = "data.json_duplicate_key", "A JSON object has a key twice."
    DATA_CSV = "data.csv", "A record is not valid CSV."
    DATA_CSV_CELLS = "data.csv_cells", "A record of a CSV file has more or fewer cells than the header."
    DATA_CSV_SEPARATOR = "data.csv_separator", "The header of a CSV file is separated by something else than commas."
    DATA_DUPLICATE_COLUMN = "data.duplicate_column", "A CSV or Parquet file has two columns of one name."
    DATA_ROW_NOT_OBJECT = "data.row_not_object", "A row is not an object with named fields."
    DATA_EMPTY_TRAIN_SPLIT = "data.empty_train_split", "The validation fraction takes every row."
    DATA_FORMAT_UNKNOWN = "data.format_unknown", "The fields of a file's first row fit no format."
    DATA_FORMAT_AMBIGUOUS = "data.format_ambiguous", "The fields of a file's first row fit more than one format."
    DATA_PREFERENCES = (
        "data.preferences",
        "The objective does not go with the rows: it compares answers and they hold none, or the other way round.",
    )
    DATA_COLUMN_MISSING = "data.column_missing", "`columns` names a field that the first row of a file lacks."
    DATA_GROUP_MISSING = "data.group_missing", "No row has a value of the field that `group_by` names."
    DATA_COLUMN_UNUSED = "data.column_unused", "`columns` maps a field that the format does not read."
    DATA_NOT_CHAT = "data.not_chat", "A setting is for conversations, and the rows are something else."
    DATA_FIELD_MISSING = "data.field_missing", "A row lacks a field that its format needs."
    DATA_FIELD_TYPE = "data.field_type", "A field holds a value of the wrong type."
    DATA_FIELD_UNUSED = "data.field_unused", "A row holds something that would not reach training."
    DATA_FIELD_CONFLICT = "data.field_conflict", "Two fields of a row contradict each other."
    DATA_FIELD_JSON = "data.field_json", "A field must hold JSON, and its value cannot be read or written as JSON."
    DATA_SURROGATE = "data.surrogate", "A field holds a lone surrogate, which is not a character."
    DATA_ROLE = "data.role", "A message has an unknown role, or a field that its role may not have."
    DATA_WEIGHT = "data.weight", "The weight of a message is not 0 or 1, or contradicts its role or `loss_on`."
    DATA_NO_QUESTION = "data.no_question", "A row to be answered holds no prompt."
    DATA_NO_ANSWER = "data.no_answer", "A row to be trained on holds no answer."
    DATA_TOOL_CALL = "data.tool_call", "A tool call does not name a function."
    DATA_TOKEN_ID = "data.token_id", "A token id is negative, or not in the vocabulary."
    DATA_LABELS = "data.labels", "`labels` are neither the ids at their own places nor -100."
    DATA_LENGTHS = "data.lengths", "`labels` or `attention_mask` have another length than `input_ids`."
    DATA_PADDING = "data.padding", "`input_ids` come with padding."

    # Data: templates, rendering, packing, cache (data.*, template.*, tokenizer.*)

    TOKENIZER_NO_EOS = "tokenizer.no_eos", "The tokenizer has no end-of-sequence token."
    TOKENIZER_FAILS = "tokenizer.fails", "The tokenizer fails on every text."
    TOKENIZER_FAILS_ON_ROW = "tokenizer.fails_on_row", "The tokenizer fails on the text of one row or prompt."
    TOKENIZER_ID_BEYOND_MODEL = "tokenizer.id_beyond_model", "The model has no embedding for a token."
    TEMPLATE_MISSING = "template.missing", "Conversations need a chat template, and the tokenizer has none."
    TEMPLATE_NOT_JINJA = "template.not_jinja", "The chat template of the tokenizer cannot be compiled."
    TEMPLATE_REFUSES_MESSAGES = "template.refuses_messages", "The chat template raises an error for a conversation."
    TEMPLATE_OMITS_TOOLS = "template.omits_tools", "The chat template does not render the tools of a conversation."
    TEMPLATE_OMITS_MESSAGE = "template.omits_message", "The chat template does not render the result of a tool call."
    TEMPLATE_OMITS_REASONING = "template.omits_reasoning", "The chat template does not render an answer's reasoning."
    TEMPLATE_OMITS_TOOL_CALLS = "template.omits_tool_calls", "The chat template does not render an answer's tool calls."
    TEMPLATE_HIDES_ANSWER = "template.hides_answer", "Where a supervised answer begins and ends cannot be found."
    TEMPLATE_PROMPT_DIFFERS = "template.prompt_differs", "The prompt ends in a text that the answer lacks."
    TEMPLATE_UNMARKED_ANSWER = "template.unmarked_answer", "The generation marks of the template leave out an answer."
    DATA_NO_SUPERVISED_TURN = "data.no_supervised_turn", "A conversation has no assistant turn to train on."
    DATA_ROW_TOO_LONG = "data.row_too_long", "A row is longer than data.max_length, and data.truncation is error."
    DATA_NOTHING_TO_LEARN = "data.nothing_to_learn", "No row of a dataset split has a supervised token."
    DATA_TOO_MANY_DROPPED = "data.too_many_dropped", "More rows would be dropped than data.max_dropped allows."
    DATA_REPLAY_UNKNOWN = "data.replay_unknown", "The adapter to start from does not say which rows it was trained on."
    DATA_REPLAY_CHANGED = "data.replay_changed", "The rows of the earlier run are not those it was trained on."
    DATA_REPLAY_TOO_LONG = "data.replay_too_long", "The rows of the earlier run are longer than data.max_length."
    DATA_CACHE_NOT_WRITTEN = "data.cache_not_written", "The tokenized rows cannot be written to the disk."

    # Base model and tokenizer (model.*)
    MODEL_NO_DIRECTORY = "model.no_directory", "The path of a base model names no directory."
    MODEL_IS_FILE = "model.is_file", "The path of a base model is a file, not a directory."
    MODEL_NO_CONFIG = "model.no_config", "A directory or repository has no config.json, so it holds no model."
    MODEL_NO_REPOSITORY = "model.no_repository", "There is no such directory, and no such repository on the hub."
    MODEL_INVALID_ID = "model.invalid_id", "A name is neither a directory nor a possible id of a hub repository."
    MODEL_GATED = "model.gated", "The repository is gated, and this account has no access to it."
    MODEL_NO_REVISION = "model.no_revision", "The repository has no such revision."
    MODEL_LOCAL_REVISION = "model.local_revision", "A revision is set for a directory, which has none."
    MODEL_HUB_UNREACHABLE = "model.hub_unreachable", "The hub cannot be reached, and the model is not cached."
    MODEL_DOWNLOAD_FAILED = "model.download_failed", "The download of a file from the hub failed."
    MODEL_NEEDS_CODE = "model.needs_code", "The model needs code from its repository, which is not trusted."
    MODEL_FOREIGN_CODE = "model.foreign_code", "A file of the model names code of another repository."
    MODEL_FOREIGN_KERNEL = (
        "model.foreign_kernel",
        "The file config.json names an attention kernel of another repository.",
    )
    MODEL_CODE_NAME = "model.code_name", "A file of the model names code in no module of its own repository."
    MODEL_CODE_OUTSIDE = "model.code_outside", "Code in the model's directory is a link to a file outside of it."
    MODEL_LFS_POINTER = "model.lfs_pointer", "A file of weights is a Git LFS pointer."
    MODEL_GGUF_NOT_FOUND = "model.gguf_not_found", "The directory or repository does not have the GGUF file."
    MODEL_GGUF_OUTSIDE = "model.gguf_outside", "The path of the GGUF file leads out of the model directory."
    MODEL_NOT_GGUF = "model.not_gguf", "The file is not in the GGUF format."
    MODEL_GGUF_VERSION = "model.gguf_version", "The version of the GGUF file cannot be read."
    MODEL_GGUF_SPLIT = "model.gguf_split", "The GGUF file is one part of several."
    MODEL_GGUF_TRUNCATED = "model.gguf_truncated", "The GGUF file is cut off."
    MODEL_GGUF_DAMAGED = "model.gguf_damaged", "The header of the GGUF file is damaged."
    MODEL_MISSING_PACKAGE = "model.missing_package", "A package that this model or setting needs is not installed."
    MODEL_CONFIG_UNREADABLE = (
        "model.config_unreadable",
        "The transformers library cannot load the configuration of the model.",
    )
    MODEL_TOKENIZER_UNREADABLE = (
        "model.tokenizer_unreadable",
        "The transformers library cannot load the tokenizer of the model.",
    )
    MODEL_UNREADABLE = "model.unreadable", "The transformers library cannot build or load the model."
    MODEL_INVALID_ARCHITECTURES = "model.invalid_architectures", "`architectures` in config.json is no list of names."
    MODEL_IMPLAUSIBLE_SIZE = "model.implausible_size", "A count in config.json is larger than any model has."
    MODEL_ENCODER_DECODER = "model.encoder_decoder", "The model is an encoder-decoder."
    MODEL_NOT_CAUSAL = "model.not_causal", "The model is not a causal language model."
    MODEL_WEIGHTS_DAMAGED = "model.weights_damaged", "A file of weights is damaged or cut off."
    MODEL_WEIGHTS_CHANGED = "model.weights_changed", "A file of the model changed while it was being read."
    MODEL_WEIGHTS_MISSING = "model.weights_missing", "The files lack tensors that config.json asks for."
    MODEL_WEIGHTS_EXTRA = "model.weights_extra", "The files hold more layers or biases than config.json asks for."
    MODEL_WEIGHTS_SHAPE = "model.weights_shape", "Tensors have another shape than config.json asks for."
    MODEL_WEIGHTS_NOT_FINITE = "model.weights_not_finite", "Weights of the model are NaN or inf."
    MODEL_TEMPLATE_UNREADABLE = "model.template_unreadable", "The chat template file cannot be read."
    MODEL_TEMPLATE_EMPTY = "model.template_empty", "The chat template file is empty."
    MODEL_TEMPLATE_INVALID = "model.template_invalid", "The chat template file is not a Jinja template."
    MODEL_QUANTIZED_ALREADY = "model.quantized_already", "The base to be quantized is quantized already."
    MODEL_QUANTIZATION_UNKNOWN = (
        "model.quantization_unknown",
        "The transformers library does not know how the base is quantized.",
    )
    MODEL_QUANTIZATION_FROZEN = "model.quantization_frozen", "A base quantized in this way cannot be trained."
    MODEL_BITSANDBYTES = "model.bitsandbytes", "8bit or 4bit is set, and bitsandbytes does not work here."
    MODEL_ORIGINAL_MISSING = "model.original_missing", "LoftQ does not find a weight as it was before quantization."
    MODEL_NO_BFLOAT16 = "model.no_bfloat16", "The GPU does not compute in bfloat16."
    MODEL_NEEDS_GPU = "model.needs_gpu", "A setting of the model needs a GPU, and there is none."
    MODEL_FLASH_ATTENTION = "model.flash_attention", "Flash attention is set without its package or a CUDA GPU."

    # LoRA and adapter directories (lora.*, adapter.*)
    LORA_NO_TARGETS = "lora.no_targets", "The list of targets, or a name in it, is empty."
    LORA_UNKNOWN_TARGET = "lora.unknown_target", "A name or regular expression matches no module."
    LORA_UNSUITABLE_TARGET = "lora.unsuitable_target", "A target is no linear layer or embedding."
    LORA_AMBIGUOUS_TARGET = "lora.ambiguous_target", "PEFT cannot tell a target from another module."
    LORA_NO_EFFECT = "lora.no_effect", "PEFT cannot adapt a target, or an adapter on it has no effect."
    LORA_NO_LINEAR = "lora.no_linear", "The model has no linear layer that LoRA can adapt."
    LORA_NO_ATTENTION = "lora.no_attention", "Roles are named, and the model has no attention."
    LORA_NO_ROLE = "lora.no_role", "No module of the model's attention is known to serve a role."
    LORA_ROLE_PARTIAL = "lora.role_partial", "A role is known in some attention layers only."
    LORA_NO_LAYER = "lora.no_layer", "`layers_to_transform` names a layer without targets."
    LORA_EXPRESSION = "lora.expression", "A regular expression does not compile, or takes too long to match."
    LORA_PATTERN_UNUSED = "lora.pattern_unused", "An entry of a pattern matches no target."
    LORA_PATTERN_CONFLICT = "lora.pattern_conflict", "A pattern gives a target two values."
    LORA_SAVED_UNKNOWN = "lora.saved_unknown", "`modules_to_save` names a module that does not exist."
    LORA_SAVED_TARGET = "lora.saved_target", "A module to save is a target, or holds one, or is within one."
    LORA_SAVED_CONTAINER = "lora.saved_container", "A module to save is a list of modules."
    LORA_SAVED_NO_PARAMETERS = "lora.saved_no_parameters", "A module to save has no parameters."
    LORA_SAVED_QUANTIZED = "lora.saved_quantized", "A module to save is quantized."
    LORA_SAVED_AMBIGUOUS = "lora.saved_ambiguous", "PEFT cannot tell a module to save from another module."
    LORA_UNSUPPORTED = "lora.unsupported", "PEFT cannot adapt this model."
    LORA_NO_BIAS = "lora.no_bias", "`lora.bias` is set, and the model has no such biases."
    LORA_EMBEDDING_TWICE = "lora.embedding_twice", "Two settings adapt the embedding of the trained tokens."
    LORA_NO_TOKEN = "lora.no_token", "A token to train is not in the vocabulary."
    LORA_INIT_LAYER = "lora.init_layer", "The initialization does not support the kind of a target."
    LORA_INIT_SHARED = "lora.init_shared", "The initialization changes a weight that modules share."
    LORA_INIT_RANK = "lora.init_rank", "The initialization needs more directions than a layer has."
    LORA_FA_LAYER = "lora.fa_layer", "LoRA-FA does not support the kind of a target."
    LORA_EVA_TOKENS = "lora.eva_tokens", "No batch has enough supervised tokens for eva."
    LORA_EVA_UNSETTLED = "lora.eva_unsettled", "The directions of eva do not settle."
    LORA_LOFTQ_LAYER = "lora.loftq_layer", "A target of loftq is not a 4-bit layer."
    LORA_START_SETTING = "lora.start_setting", "A setting contradicts that of the adapter to start from."
    LORA_START_TARGETS = "lora.start_targets", "The adapter to start from adapts modules that are not targets."
    LORA_START_RANK = "lora.start_rank", "The adapter to start from has a higher rank."
    LORA_START_KIND = "lora.start_kind", "The adapter to start from is of a kind that is not trained further."
    LORA_START_BASE = "lora.start_base", "The adapter to start from was trained on another base."
    LORA_NOT_FINITE = "lora.not_finite", "The trained adapter holds NaN or inf."
    LORA_UNCHANGED = "lora.unchanged", "Training did not change the adapter."
    ADAPTER_NO_DIRECTORY = "adapter.no_directory", "The path of an adapter names no directory."
    ADAPTER_IS_FILE = "adapter.is_file", "The path of an adapter is a file."
    ADAPTER_NO_CONFIG = "adapter.no_config", "The directory has no adapter_config.json."
    ADAPTER_NO_WEIGHTS = "adapter.no_weights", "The directory has no adapter_model.safetensors."
    ADAPTER_BROKEN_LINK = "adapter.broken_link", "A link in an adapter directory leads to no file."
    ADAPTER_SPECIAL_FILE = "adapter.special_file", "An adapter directory has a pipe, socket or device."
    ADAPTER_LINK_OUTSIDE = "adapter.link_outside", "A link leads out of an adapter directory."
    ADAPTER_NOT_JSON = "adapter.not_json", "A file of an adapter is not readable as JSON."
    ADAPTER_UNREADABLE = "adapter.unreadable", "A file of an adapter cannot be read."
    ADAPTER_DAMAGED = "adapter.damaged", "The weights of an adapter are damaged."
    ADAPTER_INVALID_RECORD = "adapter.invalid_record", "loratune.json is not the record of a run."
    ADAPTER_NEWER_RECORD = "adapter.newer_record", "A newer release of loratune wrote loratune.json."
    ADAPTER_CONFIG_SIZE = "adapter.config_size", "adapter_config.json is too large to be one."
    ADAPTER_NOT_LORA = "adapter.not_lora", "The configuration is not that of a LoRA adapter."
    ADAPTER_NO_BASE = "adapter.no_base", "The configuration does not name the base."
    ADAPTER_BASE_OUTSIDE = "adapter.base_outside", "The path of the base leads out of the directory it starts from."
    ADAPTER_INVALID_REVISION = "adapter.invalid_revision", "The revision of the base is not a name."
    ADAPTER_NO_TARGETS = "adapter.no_targets", "The configuration does not say which modules are adapted."
    ADAPTER_NAMES_CODE = "adapter.names_code", "The configuration names code."
    ADAPTER_UNKNOWN_KEY = "adapter.unknown_key", "This version of PEFT does not know a key that is set."
    ADAPTER_TOO_MANY_TENSORS = "adapter.too_many_tensors", "The file has more tensors than any model has modules."
    ADAPTER_FILE_MISSING = "adapter.file_missing", "A file is missing since the adapter was saved."
    ADAPTER_FILE_CHANGED = "adapter.file_changed", "A file has changed since the adapter was saved."
    ADAPTER_FILE_ADDED = "adapter.file_added", "A file that would be read was added since the adapter was saved."
    ADAPTER_MISMATCH = "adapter.mismatch", "The configuration does not fit the base."
    ADAPTER_NOT_REPRODUCIBLE = "adapter.not_reproducible", "The files do not record how PEFT has changed the base."
    ADAPTER_TENSORS_MISSING = "adapter.tensors_missing", "The file lacks tensors that the base needs."
    ADAPTER_TENSORS_EXTRA = "adapter.tensors_extra", "The file has tensors that are not the adapter's or the base's."
    ADAPTER_TENSORS_SHAPE = "adapter.tensors_shape", "Tensors have another shape than the base needs."
    ADAPTER_TENSORS_LOST = "adapter.tensors_lost", "PEFT finds no module for tensors that it has renamed."
    ADAPTER_NOT_FLOAT = "adapter.not_float", "Tensors of an adapter are no floating-point numbers."
    ADAPTER_NOT_FINITE = "adapter.not_finite", "Tensors of an adapter hold NaN or inf."
    ADAPTER_UNCLEAR_PARAMETER = (
        "adapter.unclear_parameter",
        "Parameters of one module have settings of their own, and the files do not say which tensors are whose.",
    )
    ADAPTER_NO_FACTOR = "adapter.no_factor", "A lora_A has no lora_B of its rank."
    ADAPTER_RANK = "adapter.rank", "The rank of a tensor is not that of the configuration."
    ADAPTER_SCALING = "adapter.scaling", "The scaled update of a module is not finite."
    ADAPTER_NO_COMPARISON = "adapter.no_comparison", "The base's output cannot be computed beside this adapter."
    ADAPTER_WRITE_FAILED = "adapter.write_failed", "The saved file does not hold the weights in memory."
    ADAPTER_CANNOT_SHARE = (
        "adapter.cannot_share",
        "The adapter changes its base, so that no other one can be beside it.",
    )
    ADAPTER_MIX_UNSUPPORTED = "adapter.mix_unsupported", "The adapter is more than a plain LoRA, and cannot be mixed."
    ADAPTER_MIX_SHAPES = "adapter.mix_shapes", "Adapters to be mixed have other shapes for one module."

    # Memory and disk (memory.*, disk.*)
    MEMORY_TRAINING = "memory.training", "A training step needs more memory than there is."
    MEMORY_EVALUATION = "memory.evaluation", "An evaluation during training needs more memory than there is."

    # Training, run directory, checkpoints, resuming (run.*, training.*, resume.*)
    RUN_OUTPUT_EXISTS = "run.output_exists", "The output directory exists, and --overwrite is not set."
    RUN_OUTPUT_IS_FILE = "run.output_is_file", "The output directory is a file."
    RUN_OUTPUT_IS_LINK = "run.output_is_link", "The output directory is a symbolic link, which is not followed."
    RUN_OUTPUT_IS_ROOT = "run.output_is_root", "The output directory is the root of the file system."
    RUN_OUTPUT_NO_PARENT = "run.output_no_parent", "The directory around the output directory does not exist."
    RUN_OUTPUT_UNREADABLE = "run.output_unreadable", "The output directory cannot be looked at."
    RUN_OUTPUT_NOT_WRITABLE = "run.output_not_writable", "The directory around the output directory is not writable."
    RUN_OUTPUT_APPEARED = "run.output_appeared", "Something came to a place of the run while the run was working."
    RUN_OUTPUT_NOT_MOVED = "run.output_not_moved", "The finished adapter cannot be moved to the output directory."
    RUN_PATH_INVALID = "run.path_invalid", "A path of the config, made absolute, cannot be used or recorded."
    RUN_OVERWRITE_MOUNT = "run.overwrite_mount", "The directory to be replaced is, or holds, a mount point."
    RUN_OVERWRITE_WORKING_DIRECTORY = (
        "run.overwrite_working_directory",
        "The directory to be replaced is, or holds, the working directory.",
    )
    RUN_OVERWRITE_INPUT = (
        "run.overwrite_input",
        "The output directory is, or holds, what the run reads, or lies in the adapter that it starts from.",
    )
    RUN_OVERWRITE_NO_ADAPTER = "run.overwrite_no_adapter", "The directory to be replaced holds no adapter."
    RUN_OVERWRITE_OTHER_FILES = "run.overwrite_other_files", "The directory to be replaced also holds other files."
    RUN_OVERWRITE_READ_ONLY = "run.overwrite_read_only", "The directory to be replaced is, or holds, a read-only one."
    RUN_OVERWRITE_STICKY = "run.overwrite_sticky", "Only its owner may replace the directory, which is in a sticky one."
    RUN_OVERWRITE_NEWER = "run.overwrite_newer", "The adapter to be replaced was made by a newer release."
    RUN_PARTIAL_OTHER_FILES = "run.partial_other_files", "The work in progress holds files that no run made."
    RUN_PARTIAL_KIND = "run.partial_kind", "The place of the work in progress is a link, or not a directory."
    RUN_PARTIAL_ENTRY_KIND = "run.partial_entry_kind", "A link, a pipe or the like stands in the work in progress."
    RUN_CHECKPOINT_BLOCKED = "run.checkpoint_blocked", "Something stands where a checkpoint is to be written."
    RUN_INTERRUPTED = "run.interrupted", "An interrupted run is there, and neither --resume nor --overwrite is set."
    RUN_LEFTOVERS = "run.leftovers", "An interrupted run left files there, but no whole checkpoint."
    RUN_JUST_ENDED = "run.just_ended", "Another run used the same directory and ended at this moment."
    REPORT_NO_MATPLOTLIB = "report.no_matplotlib", "The package that draws the charts of a report is not installed."
    RESUME_NO_RUN = "resume.no_run", "There is no interrupted run to resume."
    RESUME_CHECKPOINT_SKIPPED = "resume.checkpoint_skipped", "A checkpoint is damaged or incomplete, and not used."
    RESUME_NO_CHECKPOINT = "resume.no_checkpoint", "No checkpoint is whole."
    RESUME_NEWER_RECORD = "resume.newer_record", "A record of the run was written by a newer release."
    RESUME_NOT_CHANGEABLE = "resume.not_changeable", "--allow-change names a key that a resumed run cannot change."
    RESUME_CONFIG_CHANGED = "resume.config_changed", "A key has another value than before the interruption."
    RESUME_OTHER_TENSORS = "resume.other_tensors", "A checkpoint holds other tensors than the run trains."
    RESUME_UNKNOWN_KEY = "resume.unknown_key", "The run was started with a key that this release does not have."
    RESUME_ROWS_PER_STEP = "resume.rows_per_step", "An optimizer step would take another number of rows."
    RESUME_PACKS = "resume.packs", "Rows would be packed in another way."
    RESUME_PROCESSES = "resume.processes", "DeepSpeed's checkpoint is of another number or kind of processes."
    RESUME_TRAIN_CHANGED = "resume.train_changed", "The training rows have changed since the interruption."
    RESUME_VALIDATION_CHANGED = "resume.validation_changed", "The validation rows have changed since the interruption."
    RESUME_TEST_CHANGED = "resume.test_changed", "The test rows have changed since the interruption."
    RESUME_START_CHANGED = "resume.start_changed", "The adapter it starts from has changed since the interruption."
    RESUME_BASE_CHANGED = "resume.base_changed", "The base model has changed since the interruption."
    RESUME_FEWER_STEPS = "resume.fewer_steps", "More steps were taken than the config asks for."
    RESUME_NO_STEP_LEFT = "resume.no_step_left", "A changed learning rate has no effect, as all steps were taken."
    TRAINING_SHARED_PREFIXES = "training.shared_prefixes", "Shared prefixes cannot be computed once in this run."
    TRAINING_PADDING = "training.padding", "The model computes something else for rows that are padded."
    TRAINING_CONTEXT_LENGTH = "training.context_length", "Rows are longer than the context of the model."
    TRAINING_LOSS_NOT_FINITE = "training.loss_not_finite", "The loss of a training step is NaN or inf."
    TRAINING_GRADIENT_NOT_FINITE = "training.gradient_not_finite", "The gradient norm of a step is NaN or inf."
    TRAINING_WEIGHT_NOT_FINITE = "training.weight_not_finite", "A step made a weight of the adapter NaN or inf."
    TRAINING_HELD_OUT_NOT_FINITE = "training.held_out_not_finite", "The loss on validation or test rows is NaN or inf."
    TRAINING_FINAL_LOSS_NOT_FINITE = "training.final_loss_not_finite", "The loss after the last step is NaN or inf."
    TRAINING_REFERENCE = "training.reference", "Before the first step, the model is not what answers are compared with."
    TRAINING_TRACKER_FAILED = "training.tracker_failed", "A tracker failed; the run goes on without it."
    TRAINING_COLLAPSED = "training.collapsed", "The adapter predicts the same after every prompt, or at random."
    TRAINING_WORSE_THAN_BASE = "training.worse_than_base", "The adapter does worse than its base."
    ADAPTER_NO_RUN_CONFIG = "adapter.no_run_config", "--set is used with an adapter that has no run.yaml."
    ADAPTER_SET_NOT_DATA = "adapter.set_not_data", "--set names a key that training has decided."

    # Several processes (distributed.*)
    DISTRIBUTED_NOT_MET = "distributed.not_met", "The processes of the run cannot reach each other at the start."
    DISTRIBUTED_LOST = "distributed.lost", "Another process of the run has ended, or cannot be reached any more."
    DISTRIBUTED_ROWS_DIFFER = "distributed.rows_differ", "The files of two machines hold different rows."
    DISTRIBUTED_SHARDING = "distributed.sharding", "A setting does not work with sharded weights."

    # Commands after training (generate.*, chat.*, evaluate.*, params.*, push.*)
    TRAIN_BASES_DIFFER = "train.bases_differ", "Processes of one run have loaded different bases."
    TRAIN_BASE_CHANGED = "train.base_changed", "The base has changed since the sweep began."
    TRAIN_LOSS_NOT_FINITE = "train.loss_not_finite", "The trained adapter gives a loss that is NaN or inf."
    INFERENCE_OTHER_BASE = "inference.other_base", "The base is not the one that the adapter was trained on."
    INFERENCE_UNKNOWN_FINGERPRINT = (
        "inference.unknown_fingerprint",
        "The adapter records its base in a version that this release does not know.",
    )
    INFERENCE_BASE_CHANGED = "inference.base_changed", "PEFT has changed the base, so it cannot be computed alone."
    INFERENCE_BASE_UNVERIFIED = (
        "inference.base_unverified",
        "An adapter without a record names another base than the adapters beside it.",
    )
    INFERENCE_FAILED = "inference.failed", "Base and adapter cannot be computed together."
    INFERENCE_NOT_FINITE = "inference.not_finite", "Base and adapter together give NaN or inf."
    MERGE_UNSUPPORTED = "merge.unsupported", "The adapter changes its base in a way that no merged model has."
    MERGE_ROUNDING = "merge.rounding", "The dtype of the merged model overflows, or loses what the adapter changes."
    MERGE_TOO_LARGE = "merge.too_large", "The base has to be loaded to be merged, and does not fit in memory."
    EXPORT_INSIDE_INPUT = "export.inside_input", "The output directory lies in one that the command reads."
    EVALUATE_UNKNOWN_TASK = "evaluate.unknown_task", "A task is neither one of the lm-evaluation-harness nor a file."
    EVALUATE_TASK_REFUSED = "evaluate.task_refused", "A task runs code of the model, or needs images or sound."
    EVALUATE_TASK_ROWS = "evaluate.task_rows", "The rows of a task cannot be loaded."
    EVALUATE_TASK_FAILED = "evaluate.task_failed", "The lm-evaluation-harness cannot load or run a task."
    EVALUATE_TASKS_VARY = "evaluate.tasks_vary", "A task does not ask base and adapter the same."
    EVALUATE_NO_EFFECT = "evaluate.no_effect", "Base and adapter give exactly the same log-likelihoods on all tasks."
    GENERATE_EMPTY_PROMPT = "generate.empty_prompt", "A prompt is empty."
    GENERATE_TOO_LONG = "generate.too_long", "A prompt and its new tokens exceed the model's context."
    GENERATE_UNKNOWN_ADAPTER = "generate.unknown_adapter", "A row names an adapter that the command does not have."
    EVALUATE_NO_PROMPT = "evaluate.no_prompt", "Answers are to be scored, and no row has a prompt."
    EVALUATE_EXPECTED_TEXT = "evaluate.expected_text", "A metric says nothing about a row with such an expected text."
    EVALUATE_LOSS_NOT_FINITE = "evaluate.loss_not_finite", "The loss of an adapter on a row is NaN or inf."
    EVALUATE_OVERLAP = "evaluate.overlap", "Rows that are to show what is required are among the training rows."
    EVALUATE_REQUIREMENT = "evaluate.requirement", "The adapter is not shown to be as good as required."
    CHAT_UNKNOWN_COMMAND = "chat.unknown_command", "A line of a chat begins with / and is no command."
    CHAT_NOTHING_YET = "chat.nothing_yet", "A command of a chat needs a turn or an answer that there is not yet."
    CHAT_NO_SYSTEM = "chat.no_system", "A system message is given to an adapter that was trained on raw prompts."
    CHAT_CONTEXT_FULL = "chat.context_full", "A conversation leaves no room for an answer in the model's context."
    OUTPUT_FILE_EXISTS = "output_file.exists", "The file that a command is to write exists, without --overwrite."
    OUTPUT_FILE_IS_INPUT = "output_file.is_input", "The file to write is, or belongs to, an input of the command."
    OUTPUT_FILE_IS_DIRECTORY = "output_file.is_directory", "The file to write is a directory."
    OUTPUT_FILE_IS_DEVICE = "output_file.is_device", "The file to write is a socket or a block device."
    OUTPUT_FILE_NO_DIRECTORY = "output_file.no_directory", "The directory of the file to write does not exist."
    OUTPUT_FILE_DANGLING_LINK = "output_file.dangling_link", "The file to write is a link that leads nowhere."
    OUTPUT_FILE_STICKY = "output_file.sticky", "The file to write is of another user, in a sticky directory."
    OUTPUT_FILE_NOT_WRITABLE = "output_file.not_writable", "The file cannot be created or written."
    OUTPUT_FILE_UNREADABLE = "output_file.unreadable", "The path of the file to write cannot be examined."
    OUTPUT_FILE_NOT_RENAMED = "output_file.not_renamed", "The written file could not get its name."
    PUSH_BAD_NAME = "push.bad_name", "The name of a repository on the hub is not USER/NAME."
    PUSH_BASE = "push.base", "The base has no name on the hub, or --base names another base than the adapter."
    PUSH_LOCAL_PATH = "push.local_path", "A file to be pushed names a path of this machine that cannot be replaced."
    PUSH_LOGIN = "push.login", "There is no login to the hub, or the hub does not accept its token (HTTP 401)."
    PUSH_REPOSITORY = (
        "push.repository",
        "The repository has the other visibility, has been renamed, or does not hold an adapter.",
    )
    PUSH_REFUSED = "push.refused", "The hub refuses the request or the card (HTTP 403, 404 and other 4xx)."
    PUSH_CHANGED_MEANWHILE = "push.changed_meanwhile", "The repository was changed during the push (HTTP 409, 412)."
    PUSH_QUOTA = "push.quota", "The hub has no room for the files (HTTP 402, 413, 507, or 403 for its storage)."
    PUSH_HUB_FAILED = "push.hub_failed", "The hub fails or limits requests (HTTP 408, 429, 5xx)."
    PUSH_UNREACHABLE = "push.unreachable", "The hub cannot be reached, or the answer is not that of a hub."
    PUSH_DIFFERS = "push.differs", "A file that was downloaded after the push is not what was sent."
    EXPORT_UNSUPPORTED = "export.unsupported", "The program cannot read the adapter, base, tokenizer or template."
    EXPORT_FAILED = "export.failed", "A converter of llama.cpp, or llama.cpp itself, failed."
    EXPORT_DIFFERS = "export.differs", "What was exported does not compute what the adapter computes."
