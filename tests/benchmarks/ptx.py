"""Counts what one launch of a Triton kernel executes, without a GPU.

`Program` follows one thread through a kernel's PTX. Which way it goes, and which memory accesses
are masked out, depends on whole numbers only: on arguments, the thread, the program of the grid,
and loop counters. So these are computed, and nothing else is: floating point, loaded values and
data in shared memory play no part (where a decision does depend on loaded data, it counts as zero).
What is executed follows from how often each block of instructions is entered. The threads of a warp
together say how long their accesses to shared memory take, for that depends on their banks.

`machine_code` says what the compiler made of the same kernel: registers, spilled bytes, and the
number of instructions inside and outside of loops, by NVIDIA's disassembler, which Triton carries.
Counts of PTX times the ratio of the two are an estimate of the instructions that the GPU issues.
"""

import functools
import itertools
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

REGION = 44  # bits: each pointer argument gets a region of its own, so that an address names it
WIDTHS = {"b8": 1, "b16": 2, "b32": 4, "b64": 8, "b128": 16}
INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
INLINE = re.compile(r"// begin inline asm.*?// end inline asm", re.DOTALL)
SCOPES = "{} \n\t"  # of inline assembly, and what lies between
LABEL = re.compile(r"(\$[\w.]+):")
SPECIAL = {
    **{f"%tid.{a}": f"tid[{i}]" for i, a in enumerate("xyz")},
    **{f"%ctaid.{a}": f"cta[{i}]" for i, a in enumerate("xyz")},
    **{f"%nctaid.{a}": f"grid[{i}]" for i, a in enumerate("xyz")},
    **{f"%ntid.{a}": f"threads[{i}]" for i, a in enumerate("xyz")},
    "%laneid": "(tid[0] & 31)",
    "%warpid": "(tid[0] >> 5)",
}
COMPARE = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARE |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


@dataclass
class Instruction:
    """One instruction: `@guard op operands`."""

    op: str
    operands: list[str]
    guard: str = ""  # a register
    negated: bool = False

    @property
    def parts(self) -> list[str]:
        return self.op.split(".")

    def __str__(self) -> str:
        return f"{self.op} {', '.join(self.operands)}".strip()

    def targets(self) -> list[str]:
        """The registers that it writes."""
        if self.parts[0] in ("st", "bra", "bar", "ret", "exit", "red", "cp", "wgmma", "fence"):
            return []
        return re.findall(r"%\w+", self.operands[0]) if self.operands else []

    def sources(self) -> list[str]:
        """The registers that it reads, without its guard."""
        first = 1 if self.targets() else 0
        return [r for text in self.operands[first:] for r in re.findall(r"%\w+(?:\.[xyz])?", text)]


@dataclass
class Block:
    """Instructions that are executed one after the other, unless a branch in them leaves."""

    labels: list[str]
    body: list[Instruction] = field(default_factory=list)


def split(text: str) -> list[str]:
    """Operands: commas within braces and brackets do not count."""
    found, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    return [*found, text[start:].strip()] if text.strip() else []


def _inline(assembly: re.Match) -> str:
    """Inline assembly with labels and registers that are its own in the whole kernel."""
    text, mark = re.sub(r"//[^\n]*", "", assembly[0]), f"_at{assembly.start()}"
    if "try_wait" in text:  # a loop that is over when it is reached
        return "mbarrier.wait;"
    for label in re.findall(r"(?<![\w$.%:])([A-Z]\w*):", text):
        text = re.sub(rf"(?<![\w$.%]){label}\b", f"${label}{mark}", text)
    for register in re.findall(r"\.reg \.\w+ (%\w+);", text):
        text = re.sub(rf"{register}\b", register + mark, text)
    return text


def parse(ptx: str) -> tuple[list[str], list[Block], dict[str, str]]:
    """The types of a kernel's parameters, its blocks, and its registers' types by their prefix."""
    head, _, body = ptx.partition("\n{")
    params = re.findall(r"\.param\s+\.(\w+)[^,)]*?_param_\d+", head)
    text = re.sub(r"//[^\n]*", "", INLINE.sub(_inline, body).rpartition("}")[0])
    text = re.sub(r"^\s*\.(?:loc|file|section|pragma)[^\n]*$", "", text, flags=re.MULTILINE)
    types = {name: kind for kind, name in re.findall(r"\.reg\s+\.(\w+)\s+(%?\w+)", text)}
    blocks = [Block([])]
    for piece in text.split(";"):
        piece = piece.lstrip(SCOPES)
        while found := LABEL.match(piece):
            if blocks[-1].body:
                blocks.append(Block([]))
            blocks[-1].labels.append(found[1])
            piece = piece[found.end() :].lstrip(SCOPES)
        if not piece or piece[0] == ".":
            continue
        match = INSTRUCTION.match(piece)
        if not match:
            continue
        instruction = Instruction(match[3], split(match[4]), match[2] or "", match[1] == "!")
        blocks[-1].body.append(instruction)
        if instruction.parts[0] in ("bra", "ret", "exit"):
            blocks.append(Block([]))
    return params, [b for b in blocks if b.body or b.labels], types


def size_of(parts: Sequence[str]) -> int:
    """Bytes that a load or store moves."""
    width = next((int(p[1:]) // 8 for p in reversed(parts) if re.fullmatch(r"[bfsu]\d+", p)), 0)
    vector = next((int(p[1:]) for p in parts if re.fullmatch(r"v\d", p)), 1)
    return width * vector


def products(instruction: Instruction) -> tuple[str, float]:
    """The kind of a matrix instruction, and its operations for each thread that executes it."""
    parts = instruction.parts
    if parts[0] == "mma" and (m := re.search(r"m(\d+)n(\d+)k(\d+)", instruction.op)):
        return "mma", 2 * int(m[1]) * int(m[2]) * int(m[3]) / 32
    if parts[0] == "wgmma" and (m := re.search(r"m(\d+)n(\d+)k(\d+)", instruction.op)):
        return "wgmma", 2 * int(m[1]) * int(m[2]) * int(m[3]) / 128
    return "", 0.0


def read_by_products(instruction: Instruction) -> float:
    """Bytes of shared memory that a matrix instruction reads, for each thread that executes it."""
    m = re.search(r"m(\d+)n(\d+)k(\d+)", instruction.op)
    if instruction.parts[0] != "wgmma" or not m:
        return 0.0
    in_registers = instruction.operands[1].startswith("{")
    rows = int(m[2]) + (0 if in_registers else int(m[1]))
    return rows * int(m[3]) * (4 if "tf32" in instruction.op else 2) / 128


def classify(instruction: Instruction) -> str:
    """What kind of work an instruction is."""
    parts, op = instruction.parts, instruction.op
    if parts[0] in ("mma", "wgmma", "tcgen05"):
        return "matrix" if "mma" in op and "wait" not in op and "commit" not in op else "sync"
    if parts[0] in ("bar", "barrier", "membar", "fence", "mbarrier"):
        return "sync"
    if parts[0] in ("ld", "st", "cp", "ldmatrix", "stmatrix", "atom", "red"):
        if op.startswith(("ld.param", "cp.async.wait", "cp.async.commit")):
            return "other"
        return "global" if "global" in parts else "shared"
    if parts[0] in ("ex2", "sin", "cos", "rcp", "rsqrt", "sqrt", "lg2", "tanh"):
        return "special"
    if any(p in parts for p in ("f32", "f16", "bf16", "f16x2", "bf16x2", "f64")):
        return "move" if parts[0] == "mov" else "float"
    return "move" if parts[0] == "mov" else "whole"


class Program:
    """A kernel that can be followed."""

    def __init__(self, ptx: str):
        self.params, self.blocks, _ = parse(ptx)
        threads = re.search(r"\.reqntid\s+(\d+)", ptx)
        self.threads = int(threads[1]) if threads else 128
        names = dict.fromkeys(re.findall(r"\w+_param_\d+", ptx.partition("\n{")[0]))
        self.params_by_name = {name: i for i, name in enumerate(names)}
        self.of_block = {label: i for i, b in enumerate(self.blocks) for label in b.labels}
        self.static = [Counter(classify(x) for x in b.body) for b in self.blocks]
        loops = self._loops()
        self.looped = [any(a <= i <= b for a, b in loops) for i in range(len(self.blocks))]
        self._follow = self._translate(False)

    def _loops(self) -> list[tuple[int, int]]:
        found = []
        for i, block in enumerate(self.blocks):
            for x in block.body:
                if x.parts[0] == "bra" and (to := self.of_block.get(x.operands[-1], i + 1)) <= i:
                    found.append((to, i))
        return found

    def instructions(self, looped: bool) -> int:
        """The number of instructions inside or outside of loops."""
        places = zip(self.blocks, self.looped, strict=True)
        return sum(len(block.body) for block, inside in places if inside is looped)

    def anchors(self) -> int:
        """The number of matrix and global memory instructions in loops."""
        places = zip(self.static, self.looped, strict=True)
        return sum(n["matrix"] + n["global"] for n, inside in places if inside)

    def _needed(self, shared: bool) -> set[str]:
        """The registers that decide what is executed, and which memory is accessed."""
        writers: dict[str, list[Instruction]] = {}
        wanted: set[str] = set()
        for block in self.blocks:
            for x in block.body:
                for register in x.targets():
                    writers.setdefault(register, []).append(x)
                if x.guard:
                    wanted.add(x.guard)
                if is_access(x):
                    texts = [*addresses(x), *(x.operands[3:] if x.parts[0] == "cp" else [])]
                    wanted.update(re.findall(r"%\w+", ",".join(texts)))
                if shared and (address := shared_address(x)):
                    wanted.update(re.findall(r"%\w+", address))
                if x.parts[0] == "tcgen05":
                    wanted.update(re.findall(r"%\w+", ",".join(x.operands)))
        todo = list(wanted)
        while todo:
            for x in writers.get(todo.pop(), []):
                for register in (*x.sources(), *([x.guard] if x.guard else [])):
                    if register not in wanted and register not in SPECIAL:
                        wanted.add(register)
                        todo.append(register)
        return wanted

    def _translate(self, shared: bool):
        """Write a Python function that goes through the blocks as a thread does.

        If `shared`, `extra` becomes a list for each access to shared memory, of its addresses.
        """
        needed = self._needed(shared)
        names = {r: "r_" + r[1:] for r in needed}
        lines = ["def follow(P, tid, cta, grid, threads, entered, read, written, extra):"]
        lines += [f"    {' = '.join(sorted(names.values()))} = 0"] if names else []
        lines += ["    b = steps = 0", "    while True:", "        steps += 1"]
        lines += ["        if steps > 3_000_000: raise RuntimeError('the thread does not end')"]
        for i, block in enumerate(self.blocks):
            lines.append(f"        {'if' if i == 0 else 'elif'} b == {i}:")
            lines.append(f"            entered[{i}] += 1")
            done = False
            for j, x in enumerate(block.body):
                made = [] if shared and is_access(x) else self._line(x, names)
                if shared and (address := shared_address(x)):
                    guard = f"if {'not ' * x.negated}{names[x.guard]}: " if x.guard else ""
                    text = _value(address, names, self.params_by_name)
                    made.append(f"{guard}extra[{i}, {j}].append({text})")
                for text in made:
                    lines.append("            " + text)
                done = x.parts[0] in ("ret", "exit") and not x.guard
                if x.parts[0] == "bra" and not x.guard:
                    done = True
            if not done:
                end = f"b = {i + 1}" if i + 1 < len(self.blocks) else "return"
                lines.append("            " + end)
        space: dict = {"s": signed}
        exec("\n".join(lines), space)
        return space["follow"]

    def _line(self, x: Instruction, names: dict[str, str]) -> list[str]:
        guard = ""
        if x.guard:
            guard = f"if {'not ' if x.negated else ''}{names[x.guard]}: "
        value = functools.partial(_value, names=names, params=self.params_by_name)
        parts = x.parts
        if parts[0] == "bra":
            return [f"{guard}b = {self.of_block[x.operands[-1]]}; continue"]
        if parts[0] in ("ret", "exit"):
            return [guard + "return"]
        if is_access(x):
            found = []
            into = (
                "written"
                if parts[0] in ("st", "red")
                or x.op.startswith("cp.async.bulk")
                and (".global.shared" in x.op)
                else "read"
            )
            for text in addresses(x):
                address = value(text)
                amount = str(access_bytes(x))
                if parts[0] == "cp" and len(x.operands) > 3:
                    amount = f"min({amount}, {value(x.operands[3])})"
                found.append(f"{guard}{into}[({address}) >> {REGION}] += {amount}")
            return found + ([f"{guard}extra['requests'] += 1"] if found else [])
        if parts[0] == "tcgen05" and parts[1] == "mma" and len(x.operands) > 3:
            shape = value(x.operands[3])
            work = f"2 * ((({shape} >> 24) & 31) << 4) * ((({shape} >> 17) & 63) << 3) * 16"
            return [f"{guard}extra['tcgen05'] += {work}"]
        targets = [t for t in x.targets() if t in names]
        if not targets:
            return []
        made = _compute(x, value)
        if isinstance(made, dict):  # several registers
            return [f"{guard}{names[t]} = {made.get(t, '0')}" for t in targets]
        return [f"{guard}{names[t]} = {made}" for t in targets]

    @property
    def asks_for_all(self) -> bool:
        """Whether the first thread alone asks for matrix products, for all of its program."""
        return any(x.op.startswith("tcgen05.mma") for b in self.blocks for x in b.body)

    def follow(
        self, params: Sequence[int], thread: int, cta: Sequence[int], grid: Sequence[int]
    ) -> dict[str, Counter]:
        """Follow one thread.

        Args:
            params: The arguments; of a pointer, any address in the region of its index,
                (index + 1) << REGION.
            thread: Its number in its program.
            cta: Its program's place in the grid.
            grid: The grid.

        Returns:
            `read` and `written`: bytes by argument index. `work`: instructions by kind, those in
            loops (`looped`) and elsewhere (`straight`), and operations of matrix products by the
            instruction that computes them.
        """
        entered = [0] * len(self.blocks)
        read, written, extra = Counter(), Counter(), Counter()
        padded = [*params, *([0] * (len(self.params) - len(params)))]
        self._follow(
            padded, (thread, 0, 0), tuple(cta), tuple(grid), (self.threads, 1, 1), entered, read,
            written, extra,
        )  # fmt: skip
        work: Counter = Counter()
        for times, block, static, looped in zip(
            entered, self.blocks, self.static, self.looped, strict=True
        ):
            if not times:
                continue
            for kind, count in static.items():
                work[kind] += times * count
            work["looped" if looped else "straight"] += times * len(block.body)
            for x in block.body:
                name, operations = products(x)
                if name:
                    # TF32 takes twice the time of a product of half precision.
                    work["operations"] += times * operations
                    work["tensor " + name] += times * operations * (2 if "tf32" in x.op else 1)
                    work["read by products"] += times * read_by_products(x)
        if extra["tcgen05"]:  # one thread asks for the products of all
            for name in ("operations", "tensor tcgen05"):
                work[name] += extra["tcgen05"] / self.threads
        work["requests"] = extra["requests"]
        by_index = [{k - 1: v for k, v in found.items()} for found in (read, written)]
        return {"read": Counter(by_index[0]), "written": Counter(by_index[1]), "work": work}

    def wavefronts(
        self, params: Sequence[int], cta: Sequence[int], grid: Sequence[int]
    ) -> tuple[int, int]:
        """Follow a warp; return what its accesses to shared memory take, and the least they could.

        In wavefronts, of which a multiprocessor does one in a cycle: one reaches each of 32 banks
        of 4 bytes once. Accesses of 8 bytes are halves of a warp, those of 16 bytes quarters.
        """
        follow = self._translate(True)
        padded = [*params, *([0] * (len(self.params) - len(params)))]
        first = self.threads // 64 * 32  # of a warp in the middle
        lanes: list[dict[tuple[int, int], list[int]]] = []
        for lane in range(32):
            found: dict[tuple[int, int], list[int]] = defaultdict(list)
            follow(
                padded, (first + lane, 0, 0), tuple(cta), tuple(grid), (self.threads, 1, 1),
                [0] * len(self.blocks), Counter(), Counter(), found,
            )  # fmt: skip
            lanes.append(found)
        total = least = 0
        for place in {place for found in lanes for place in found}:
            x = self.blocks[place[0]].body[place[1]]
            size, used = shared_bytes(x)
            together = max(1, min(32, 128 // size))
            columns = itertools.zip_longest(*(found.get(place, []) for found in lanes[:used]))
            for column in columns:
                for i in range(0, used, together):
                    words = {
                        (address + byte) // 4
                        for address in column[i : i + together]
                        if address is not None
                        for byte in range(0, size, 4)
                    }
                    banks = Counter(word % 32 for word in words)
                    total += max(banks.values(), default=0)
                    least += -(-len(words) // 32)
        return total, least


def shared_address(x: Instruction) -> str:
    """The text of the address in shared memory, if it accesses that itself."""
    op = x.op
    if x.parts[0] in ("ld", "st") and "shared" in op or x.parts[0] in ("ldmatrix", "stmatrix"):
        return next(o for o in x.operands if o.startswith("["))
    if op.startswith("cp.async.c") and "shared" in op and len(x.operands) > 2:
        return x.operands[0]
    return ""


def shared_bytes(x: Instruction) -> tuple[int, int]:
    """Bytes of an access to shared memory for each thread, and how many threads give addresses."""
    if x.parts[0] in ("ldmatrix", "stmatrix"):
        count = next(int(p[1:]) for p in x.parts if re.fullmatch(r"x\d", p))
        return 16, 8 * count
    return (int(x.operands[2], 0) if x.parts[0] == "cp" else size_of(x.parts)), 32


def is_access(x: Instruction) -> bool:
    """Whether it reads or writes global memory."""
    parts = x.parts
    if parts[0] in ("ld", "st", "atom", "red"):
        return "global" in parts
    if x.op.startswith("cp.async") and "global" in x.op:
        return "wait" not in x.op and "commit" not in x.op
    return False


def addresses(x: Instruction) -> list[str]:
    """The text of the global address."""
    inside = [o for o in x.operands if o.startswith("[")]
    if x.parts[0] == "cp":
        if len(inside) < 2:
            return []
        return [inside[0] if ".global.shared" in x.op else inside[1]]
    return inside[:1]


def access_bytes(x: Instruction) -> int:
    if x.parts[0] == "cp":
        return int(x.operands[2], 0) if len(x.operands) > 2 and x.operands[2][0].isdigit() else 0
    return size_of(x.parts)


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def _value(text: str, names: dict[str, str], params: dict[str, int]) -> str:
    """A Python expression for an operand."""
    text = text.strip()
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        if base.strip() in params:
            return f"P[{params[base.strip()]}]"
        inner = _value(base, names, params)
        return f"{inner} + ({offset.strip() or 0})"
    if text in SPECIAL:
        return SPECIAL[text]
    if text.startswith("%"):
        return names.get(text, "0")
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return f"({text.rstrip('U')})"
    return "0"  # floating point, or a name in shared memory


def _compute(x: Instruction, value) -> "str | dict[str, str]":
    """A Python expression for what an instruction of whole numbers gives; zero for all others."""
    parts, ops = x.parts, x.operands
    kind = parts[-1]
    if kind == "pred":
        bits, sign = 1, False
    elif m := re.fullmatch(r"([bsu])(\d+)", kind):
        bits, sign = int(m[2]), m[1] == "s"
    else:
        bits, sign = 0, False
    mask = (1 << bits) - 1
    name = parts[0]
    if name == "ld" and parts[1] == "param":
        return value(ops[1])
    if name in ("elect", "mbarrier"):  # a chosen thread; a wait that is over
        return dict.fromkeys(x.targets(), "1")
    if name == "shfl":  # of what all threads of a warp have alike
        return value(ops[1])
    if name == "setp" and bits:
        left, right = (
            f"s({value(o)}, {bits})" if sign else f"({value(o)} & {mask})" for o in ops[1:3]
        )
        test = f"int({left} {COMPARE.get(parts[1], '==')} {right})"
        if len(ops) > 3 and parts[2] in ("and", "or", "xor"):
            other = value(ops[3].removeprefix("!"))
            if ops[3].startswith("!"):
                other = f"(1 - {other})"
            test = f"({test} {({'and': '&', 'or': '|', 'xor': '^'})[parts[2]]} {other})"
        first, *others = re.findall(r"%\w+", ops[0])
        return {first: test} | dict.fromkeys(others, f"1 - {test}")
    if not bits or any(o.startswith("{") for o in ops):
        return "0"
    a, b, c = (*(value(o) for o in ops[1:4]), "0", "0", "0")[:3]

    def wide(text: str, width: int = bits) -> str:
        return f"s({text}, {width})" if sign else f"({text} & {(1 << width) - 1})"

    if name in ("mov", "cvta"):
        return a
    if name == "cvt":
        source = re.fullmatch(r"([bsu])(\d+)", parts[-1])
        target = re.fullmatch(r"([bsu])(\d+)", parts[-2])
        if not source or not target:
            return "0"
        text = (
            f"s({a}, {source[2]})" if source[1] == "s" else f"({a} & {(1 << int(source[2])) - 1})"
        )
        return f"{text} & {(1 << int(target[2])) - 1}"
    if name in ("add", "sub", "and", "or", "xor"):
        sign_of = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^"}[name]
        return f"({a} {sign_of} {b}) & {mask}"
    if name in ("mul", "mad"):
        if "wide" in parts:
            text = f"{wide(a)} * {wide(b)}"
            mask = (1 << 2 * bits) - 1
        elif "hi" in parts:
            text = f"(({wide(a)} * {wide(b)}) >> {bits})"
        else:
            text = f"{a} * {b}"
        return f"({text}{f' + {c}' if name == 'mad' else ''}) & {mask}"
    if name == "shl":
        return f"({a} << min({b}, 64)) & {mask}"
    if name == "shr":
        return f"({wide(a)} >> min({b}, 64)) & {mask}"
    if name == "not":
        return f"(~{a}) & {mask}"
    if name == "neg":
        return f"(-{a}) & {mask}"
    if name == "abs":
        return f"abs(s({a}, {bits}))"
    if name in ("min", "max"):
        return f"{name}({wide(a)}, {wide(b)}) & {mask}"
    if name in ("div", "rem"):
        left, right = wide(a), wide(b)
        sign_text = f"(1 if ({left} < 0) == ({right} < 0) else -1) * "
        quotient = f"{sign_text if sign else ''}(abs({left}) // max(abs({right}), 1))"
        if name == "div":
            return f"({quotient}) & {mask}"
        return f"({left} - ({quotient}) * {right}) & {mask}"
    if name == "selp":
        return f"({a} if {c} else {b})"
    if name == "bfe":
        text = f"(({a} >> {b}) & ((1 << {c}) - 1))"
        return f"s({text}, max({c}, 1)) & {mask}" if sign else text
    if name == "bfi":
        length = value(ops[4])
        field_mask = f"(((1 << {length}) - 1) << {c})"
        return f"(({b} & ~{field_mask}) | (({a} << {c}) & {field_mask})) & {mask}"
    if name == "popc":
        return f"({a}).bit_count()"
    if name == "lop3":
        table = int(ops[4], 0)
        terms = []
        for i in range(8):
            if table >> i & 1:
                picks = [t if i >> (2 - j) & 1 else f"~{t}" for j, t in enumerate((a, b, c))]
                terms.append(f"({' & '.join(picks)})")
        return f"({' | '.join(terms) or '0'}) & {mask}"
    if name == "shf":
        return "0"
    return "0"


@dataclass(frozen=True)
class MachineCode:
    """What the compiler made of a kernel."""

    registers: int
    spilled: int  # bytes of local memory of a thread
    looped: int  # instructions in loops
    straight: int
    anchors: int  # matrix and global memory instructions in loops


SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")


ANCHOR = re.compile(r"(HGMMA|HMMA|QGMMA|UTC\w*MMA|LDG|STG|LDGSTS|UTMALDG|UTMASTG)\b")


@functools.cache
def machine_code(cubin: bytes) -> MachineCode:
    """Disassemble a compiled kernel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def output(tool: str, *options: str) -> str:
            command = [str(tools / tool), *options, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", output("cuobjdump", "-res-usage"))
        assert usage, "cuobjdump says nothing about registers"
        text = output("nvdisasm", "-c")
    codes: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if found := re.match(r"^(\.L_\w+):", line.strip()):
            labels[found[1]] = len(codes)
        elif found := SASS.match(line):
            codes.append((found[2], found[3]))
    looped: set[int] = set()
    last = next((i for i in reversed(range(len(codes))) if codes[i][0] == "EXIT"), len(codes))
    for i, (code, rest) in enumerate(codes):
        to = re.search(r"\.L_\w+", rest) if code.startswith("BRA") else None
        if to and labels.get(to[0], len(codes)) < i:
            looped.update(range(labels[to[0]], i + 1))
    real = [i for i, (code, _) in enumerate(codes) if not code.startswith("NOP") and i <= last]
    inside = sum(i in looped for i in real)
    anchors = sum(i in looped and bool(ANCHOR.match(codes[i][0])) for i in real)
    return MachineCode(int(usage[1]), int(usage[2]), inside, len(real) - inside, anchors)
