"""The letters of every shape, and the array types built from them.

b batch · f latent frame · h w latent row, column · c latent channel · m pixel frames of a latent frame
n tokens of one frame · l tokens of a clip (f n) · s text token · e width of a text token · d width · k head dim
F H W frame, row, column of pixels · t noise time, 0 clean .. 1 noise
"""

from jaxtyping import Array, Bool, Float, Int, UInt8

Frames = Float[Array, "b F H W 3"]       # [-1, 1]
Films = UInt8[Array, "b F H W 3"]        # 0 .. 255, as decoded
Latents = Float[Array, "b f h w c"]
Times = Float[Array, "b f"]              # 0 clean .. 1 noise
Tokens = Float[Array, "b f n d"]
Text = Float[Array, "b s e"]
PixelMask = Bool[Array, "b F h w"]       # True = given; time in pixel frames, space in latent cells
Mask = Float[Array, "b f h w m"]         # 1 = given; the pixel mask packed to latent frames
Scalar = Float[Array, ""]
Heads = Float[Array, "b f n a k"]        # a heads of width k
Segments = Int[Array, "b f n"]           # tokens attend within equal numbers; negative = padding
