"""COCO's categories, for checkpoints that give every category id up to 90 a class and name none of them."""

_IN_ORDER = """
    person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant - stop_sign parking_meter
    bench bird cat dog horse sheep cow elephant bear zebra giraffe - backpack umbrella - - handbag tie suitcase frisbee
    skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard tennis_racket bottle - wine_glass
    cup fork knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog pizza donut cake chair couch
    potted_plant bed - dining_table - - toilet - tv laptop mouse remote keyboard cell_phone microwave oven toaster sink
    refrigerator - book clock vase scissors teddy_bear hair_drier toothbrush
"""

COCO_91: tuple[str, ...] = ("N/A", *("N/A" if name == "-" else name.replace("_", " ") for name in _IN_ORDER.split()))
"""The name of each category id from 0 to 90, "N/A" where COCO has none."""
