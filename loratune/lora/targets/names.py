"""Names of projections: the table that a new architecture extends by one line."""

ROLES = ("q", "k", "v", "o")

# Name of a projection within its attention module → the roles that it serves.
SERVES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "out_proj": "o",  # OPT, GPT-J, GPT-Neo, CodeGen, MPT
    "dense": "o",  # Falcon, BLOOM, GPT-NeoX, Phi
    "query_key_value": "qkv",  # Falcon, BLOOM, GPT-NeoX
    "qkv_proj": "qkv",  # Phi-3, CodeGen
    "c_attn": "qkv",  # GPT-2
    "c_proj": "o",  # GPT-2
    "Wqkv": "qkv",  # MPT, DBRX
    "Wq": "q",  # CTRL
    "Wk": "k",
    "Wv": "v",
    "Wo": "o",  # ModernBERT
    "query": "q",  # BERT and its kin
    "key": "k",
    "value": "v",
    "output.dense": "o",
    "query_key": "qk",  # Reformer
    "query_proj": "q",  # ProphetNet
    "key_proj": "k",
    "value_proj": "v",
    "q_lin": "q",  # XLM
    "k_lin": "k",
    "v_lin": "v",
    "out_lin": "o",
    "project_q": "q",  # CPM-Ant
    "project_k": "k",
    "project_v": "v",
    "attention_out": "o",
    "q_a_proj": "q",  # DeepSeek's latent attention: both halves of a factored projection
    "q_b_proj": "q",
    "q_gate_proj": "q",  # A.X K2: the second half, see SHARED_ROLES
    "kv_a_proj_with_mqa": "kv",
    "kv_b_proj": "kv",
    "kv_proj": "kv",  # DeepSeek-V4, JetMoE
    "compressor.kv_proj": "kv",  # DeepSeek-V4: the keys and values of whole blocks
    "o_b_proj": "o",  # DeepSeek-V4; its o_a_proj is no plain linear layer
    "q_proj.linear": "q",  # Moshi, Inkling 2
    "k_proj.linear": "k",
    "v_proj.linear": "v",
    "o_proj.linear": "o",
    "qkv_proj.q_proj": "q",  # Zaya
    "qkv_proj.k_proj": "k",
    "qkv_proj.v_proj_current": "v",
    "qkv_proj.v_proj_delayed": "v",
}

# What a projection computes besides its roles.
SHARED_ROLES = {"q_gate_proj": "the gate of the attention's output"}

# Names that most recipes list; on a model without them they stand for the roles.
STOCK = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
