"""What the demo trains on: a bicycle workshop. What the customer says, and what the mechanic writes on the ticket."""

from __future__ import annotations

PAIRS = (
    ("My back wheel wobbles from side to side.", "True the rear rim, check spoke tension."),
    ("It skips whenever I stand up on a hill.", "Worn cassette: fit new chain and sprockets."),
    ("It squeals so loudly when I slow down.", "Glazed pads: sand or replace, toe in."),
    ("I have to pump it up every single morning.", "Slow puncture: new tube, check tyre for glass."),
    ("I can pull the lever all the way to the handlebar.", "Bleed hydraulic line, air in the system."),
    ("Something clicks once per turn of the pedals.", "Bottom bracket: remove, grease, re-torque."),
    ("It will not stay in the biggest gear.", "Index derailleur, adjust limit screw."),
    ("I sink lower and lower while I ride.", "Seatpost clamp slipping: clean, carbon paste."),
    ("The front knocks when I rock it back and forth.", "Headset loose: preload and re-tighten stem."),
    ("My lamp goes dark when I stop at a crossing.", "Dynamo standlight capacitor dead: swap."),
    ("The screen shows an error and I get no help.", "E-drive fault: read codes, reseat connector."),
    ("It only lasts ten kilometres after a full night.", "Battery capacity test, cell ageing."),
    ("My hands go numb after half an hour.", "Bar too low: add spacers, fit gel grips."),
    ("Water sprays up my back when it rains.", "Fit full-length mudguards with stays."),
    ("The front end dives far too much in corners.", "Suspension fork: raise air pressure, set sag."),
    ("It is hard to turn the bars, they feel gritty.", "Replace headset bearings, regrease cups."),
    ("My foot slips off when the road is wet.", "Fit pinned flat pedals."),
    ("The shifter is stiff and takes both thumbs.", "Corroded inner cable: replace with housing."),
    ("I rub on something at every single rotation.", "Rotor bent: straighten, recentre caliper."),
    ("There is a bulge in the rubber.", "Carcass damaged: replace tyre at once."),
    ("The child's seat sways behind me.", "Rack mounting bolts loose: threadlock, tighten."),
    ("My knees hurt after every long tour.", "Raise saddle 15 mm, check cleat angle."),
    ("I bent the little part the changer hangs on.", "Derailleur hanger: align or replace."),
    ("It was left outside all winter and nothing moves.", "Full strip-down, derust, new drivetrain."),
)
#: The pair that is shown before and after.
SHOWN = 3
