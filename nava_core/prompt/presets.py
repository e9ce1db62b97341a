"""Ready words for how a clip is filmed and how it sounds, in English and Chinese, by name."""

from __future__ import annotations

NONE = "none"

PRESETS: dict[str, dict[str, tuple[str, str]]] = {
    "shot": {
        "extreme close-up": ("an extreme close-up that fills the frame with a detail", "特写，细节占满画面"),
        "close-up": ("a close-up of the face", "面部近景"),
        "medium shot": ("a medium shot from the waist up", "腰部以上的中景"),
        "full shot": ("a full shot from head to foot", "从头到脚的全景"),
        "wide shot": ("a wide shot that shows the whole place", "展现整个场景的远景"),
        "over the shoulder": ("a view over the shoulder of one person to another", "越过一人肩膀看向另一人"),
        "low angle": ("a low angle that looks up", "低角度仰拍"),
        "from above": ("a view from high above", "高处俯拍"),
    },
    "movement": {
        "still": ("the camera stands still", "镜头固定不动"),
        "slow push in": ("the camera pushes in slowly", "镜头缓慢推近"),
        "slow pull back": ("the camera pulls back slowly", "镜头缓慢拉远"),
        "pan left": ("the camera pans to the left", "镜头向左摇"),
        "pan right": ("the camera pans to the right", "镜头向右摇"),
        "tilt up": ("the camera tilts upwards", "镜头向上摇"),
        "follow": ("the camera follows the movement at an even distance", "镜头保持距离跟随移动"),
        "circle": ("the camera circles the subject", "镜头环绕主体"),
        "handheld": ("a handheld camera with a slight sway", "手持镜头，轻微晃动"),
    },
    "sound_field": {
        "close and dry": ("the sound is close and dry, with hardly any echo", "声音贴近而干净，几乎没有回声"),
        "small room": ("the sound of a small furnished room", "带有家具的小房间的声音"),
        "large hall": ("the sound rings on in a large hall", "声音在大厅中久久回荡"),
        "open air": ("open-air sound without echo", "室外空旷的声音，没有回声"),
        "wide stereo": ("wide stereo, with sounds on either side", "宽阔的立体声，左右两侧都有声音"),
        "distant": ("everything is heard from some way off", "所有声音都从远处传来"),
    },
    "emotion": {
        "calm": ("calm", "平静"),
        "warm": ("warm", "温暖"),
        "joyful": ("joyful", "喜悦"),
        "sad": ("sad", "悲伤"),
        "angry": ("angry", "愤怒"),
        "afraid": ("frightened", "恐惧"),
        "surprised": ("surprised", "惊讶"),
        "tense": ("tense", "紧张"),
        "serious": ("serious", "严肃"),
        "playful": ("playful", "俏皮"),
    },
    "pace": {
        "slow": ("slowly", "缓慢"),
        "easy": ("unhurriedly", "从容"),
        "steady": ("steadily", "平稳"),
        "quick": ("quickly", "较快"),
        "urgent": ("urgently", "急促"),
        "halting": ("haltingly", "断断续续"),
    },
    "place": {
        "close": ("from close by", "近处"),
        "left": ("from the left", "左侧"),
        "right": ("from the right", "右侧"),
        "far": ("from far away", "远处"),
        "behind the camera": ("from behind the camera", "镜头后方"),
        "off screen": ("from off screen", "画面之外"),
        "telephone": ("from a telephone", "电话里"),
        "loudspeaker": ("from a loudspeaker", "扩音器"),
    },
}


def preset_text(kind: str, name: str, chinese: bool) -> str:
    """The words of preset ``name`` of ``kind`` (a key of `PRESETS`) in Chinese or English; "" for "" and "none".

    Raises ValueError, with the names there are, for another name.
    """
    if name in ("", NONE):
        return ""
    if name not in PRESETS[kind]:
        raise ValueError(f"No {kind} preset “{name}”: choose one of {', '.join([NONE, *PRESETS[kind]])}.")
    return PRESETS[kind][name][chinese]


def with_preset(kind: str, name: str, text: str, chinese: bool) -> str:
    """A preset's words, then the user's own ``text``; either may be missing."""
    parts = [preset_text(kind, name, chinese), text.strip()]
    return ("，" if chinese else ", ").join(part for part in parts if part)
