"""Optional methods against instability: ZClip, StableAdamW's update clipping, QK-clip.

Each is a pure function of the training state and the batch, or has a state that travels with
snapshots. A rollback is therefore as exact with them as without.
"""
