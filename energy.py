"""Energy of the arithmetic of a net, by the paper's count (supplements D and E): operations x energy of each.

Memory traffic, which costs more, is left out, as in the paper. The same lab later simulated whole accelerators, and
found nets like BNTT's to save 2.8x (SATA) and 4x (SpikeSim) where this count had claimed 20x (arXiv 2309.03388).
"""

MAC_PJ, AC_PJ = 4.6, 0.9  # a 32-bit multiply-accumulate and an accumulate, 45 nm CMOS (Horowitz, ISSCC 2014)
CONVENTION = (
    "An operation of a spiking layer is an accumulate: its dense multiply-adds x mean |input|, so an average-pooled "
    "input counts as the spikes that made it; an analog input is multiplied, and counts in full at every step."
)
CAVEAT = (
    "Arithmetic alone. With memory and peripherals simulated, the same lab later found savings of 2.8x (SATA) and 4x "
    "(SpikeSim) where this count had claimed 20x (arXiv 2309.03388)."
)


def energy(meter, steps=None):
    """Energy of one image over `steps` (default all), from a `utill.SpikeMeter` that has seen some: plain numbers.

    layers: a dict for each synapse: name; multiply_adds, dense, of one step; rate, its operations over all steps /
    multiply_adds; operations of an image over all steps; analog, whether they are multiply-accumulates. snn_pj: what
    those take; ann_pj: what one pass through the same net without spikes would, all multiply-accumulates, of a
    sequence that of one pixel or frame; in pJ.
    """
    layers = []
    for name, dense in meter.multiply_adds.items():
        operations = float(meter.operations(name)[:steps].sum())
        analog = name in meter.analog
        layers.append(
            dict(name=name, multiply_adds=dense, rate=operations / dense, operations=operations, analog=analog)
        )
    snn = sum(layer["operations"] * (MAC_PJ if layer["analog"] else AC_PJ) for layer in layers)
    ann = sum(layer["multiply_adds"] * MAC_PJ for layer in layers)
    return {"layers": layers, "snn_pj": snn, "ann_pj": ann, "mac_pj": MAC_PJ, "ac_pj": AC_PJ}
