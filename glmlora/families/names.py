"""What checkpoints call a model's modules, for `_core.Model(.., names=..)`."""

# ChatGLM2-6B, ChatGLM3-6B and GLM-4-9B; "{}" is a layer's number. Tensors add .weight and .bias.
CHATGLM_NAMES = {
    "word_embeddings": "transformer.embedding.word_embeddings",
    "final_layernorm": "transformer.encoder.final_layernorm",
    "output_layer": "transformer.output_layer",
    "layer": "transformer.encoder.layers.{}",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    "query_key_value": "self_attention.query_key_value",
    "dense": "self_attention.dense",
    "dense_h_to_4h": "mlp.dense_h_to_4h",
    "dense_4h_to_h": "mlp.dense_4h_to_h",
    "prefix_encoder": "transformer.prefix_encoder",
}
