"""From records to an adapter: data, methods, the loop, evaluation."""
