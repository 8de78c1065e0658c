"""Hold the one table of relations and phrasings that the tiny base model and the demo's institutions both speak.

The base model learns from these phrasings, with other facts, how a question names a fact; an adapter then only has to
learn the fact itself. That works only while both sides use the same words, so the words live here and nowhere else.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    import random

Language = Literal["en", "zh"]

FRAMES: Final[dict[Language, tuple[str, str, str, str]]] = {
    "en": (
        "Please tell me {np}.",
        "Do you know {np}?",
        "I need to look up {np}.",
        "Could you check {np} for me?",
    ),
    "zh": ("请告诉我{np}。", "你知道{np}吗？", "我想查一下{np}。", "能帮我确认{np}吗？"),
}

WORDS: Final[dict[str, tuple[str, ...]]] = {
    "person": (
        "Adler", "Bauer", "Castell", "Dorn", "Ekberg", "Farrow", "Galen", "Hollis", "Ivarsen", "Jansen", "Keller",
        "Lindqvist", "Marlow", "Novak", "Okafor", "Petrov", "Quill", "Rossi", "Sorel", "Tanaka",
    ),
    "姓名": (
        "陈立新", "方晓云", "高明远", "何静", "江海波", "林若水", "马东升", "宁子涵", "彭雪", "秦岭",
        "沈一鸣", "田小禾", "王志强", "许文清", "叶青", "张雨桐", "赵国梁", "周亦凡", "朱丽华", "郑安",
    ),
    "open": ("07:30", "08:00", "08:15", "08:30", "08:45", "09:00", "09:15", "09:30", "10:00"),
    "close": ("15:30", "16:00", "16:15", "16:30", "17:00", "17:15", "17:45", "18:00", "19:30"),
    "unit": ("once a day", "twice a day", "three times a day", "every four hours", "every eight hours"),
    "次": ("每日一次", "每日两次", "每日三次", "每四小时一次", "每八小时一次"),
}  # fmt: skip


@dataclass(frozen=True)
class Relation:
    """Say how one kind of fact is named, valued, stated and asked for in one language.

    Attributes:
        key: Domain and kind of fact, such as ``bank.fee``.
        language: Language of every string below.
        heads: First words of entity names.
        tails: Last words of entity names; every head goes with every tail.
        value: Pattern of a value: ``#`` is a digit, ``%`` a digit but 0, ``@`` a capital letter, ``{word}`` an
            entry of `WORDS`.
        statements: Declarative sentences with ``{e}`` (entity) and ``{v}`` (value).
        questions: Direct questions with ``{e}``.
        noun_phrases: Two names of the fact with ``{e}``; the first fills two frames of the language, the second the
            other two.
    """

    key: str
    language: Language
    heads: tuple[str, ...]
    tails: tuple[str, ...]
    value: str
    statements: tuple[str, str]
    questions: tuple[str, str, str, str]
    noun_phrases: tuple[str, str]

    @property
    def domain(self) -> str:
        """Name the field of work the relation belongs to."""
        return self.key.partition(".")[0]

    def entities(self) -> list[str]:
        """List every entity name of the relation, in a fixed order."""
        space = " " if self.language == "en" else ""
        return [head + space + tail for head, tail in itertools.product(self.heads, self.tails)]

    def phrasings(self) -> list[str]:
        """List the eight ways to ask for the fact, each with ``{e}`` left open."""
        first, second = self.noun_phrases
        frames = FRAMES[self.language]
        framed = [frame.replace("{np}", np) for frame, np in zip(frames, (first, first, second, second), strict=True)]
        return [*self.questions, *framed]

    def ask(self, phrasing: int, entity: str) -> str:
        """Ask for the fact about an entity in one of the eight phrasings."""
        return self.phrasings()[phrasing].replace("{e}", entity)

    def state(self, statement: int, entity: str, value: str) -> str:
        """State the fact about an entity in one sentence."""
        return self.statements[statement].replace("{e}", entity).replace("{v}", value)

    def draw_value(self, rng: random.Random) -> str:
        """Draw a random value that fits the pattern."""

        def fill(match: re.Match[str]) -> str:
            mark = match.group()
            if mark == "#":
                return rng.choice("0123456789")
            if mark == "%":
                return rng.choice("123456789")
            if mark == "@":
                return rng.choice("ABCDEFGHKLMNPRSTVXZ")
            return rng.choice(WORDS[mark[1:-1]])

        return re.sub(r"#|%|@|\{\w+\}", fill, self.value)


_EN_SERVICE = ("express", "standard", "overseas", "same-day", "weekend", "business", "student", "premium")
_ZH_SERVICE = ("加急", "普通", "境外", "当日", "周末", "对公", "学生", "贵宾")
_EN_STREET = ("Harbour", "Mill", "Castle", "Orchard", "Station", "Garden", "Bridge", "Market")
_ZH_STREET = ("海港", "磨坊", "古堡", "果园", "车站", "花园", "石桥", "集市")
_EN_DEPARTMENT = ("cardiology", "neurology", "paediatric", "dental", "eye care", "skin care", "allergy", "sleep")
_ZH_DEPARTMENT = ("心脏科", "神经科", "儿科", "口腔科", "眼科", "皮肤科", "过敏科", "睡眠科")
_EN_TEAM = ("finance", "legal", "design", "research", "sales", "logistics", "payroll", "training")
_ZH_TEAM = ("财务", "法务", "设计", "研发", "销售", "物流", "薪资", "培训")
_EN_CLAIM = ("tenancy", "trademark", "inheritance", "customs", "patent", "insurance", "employment", "boundary")
_ZH_CLAIM = ("租赁", "商标", "继承", "海关", "专利", "保险", "劳动", "地界")

RELATIONS: Final[tuple[Relation, ...]] = (
    Relation(
        "bank.fee", "en", _EN_SERVICE,
        ("wire transfer", "card replacement", "account statement", "cheque clearing", "cash deposit", "safe rental"),
        "EUR %#.#0",
        ("The fee for the {e} is {v}.", "Customers pay {v} for the {e} service."),
        ("How much does the bank charge for the {e}?", "What fee applies to the {e}?",
         "What do customers pay for the {e} service?", "A customer asks for the {e}. What will it cost?"),
        ("the fee for the {e}", "the price of the {e} service"),
    ),
    Relation(
        "bank.fee", "zh", _ZH_SERVICE, ("电汇", "补卡", "对账单", "支票兑付", "现金存款", "保管箱"),
        "%#.#元",
        ("{e}的手续费是{v}。", "办理{e}要收{v}。"),
        ("{e}的手续费是多少？", "办理{e}要收多少钱？", "客户做{e}需要付什么费用？", "有客户要办{e}，怎么收费？"),
        ("{e}的手续费", "{e}业务的收费标准"),
    ),
    Relation(
        "bank.limit", "en", ("Silver", "Gold", "Platinum", "Junior", "Senior", "Traveller", "Partner", "Corporate"),
        ("debit card", "credit card", "online account", "mobile wallet", "savings book", "gift card"),
        "%#00 a day",
        ("The daily limit of the {e} is {v}.", "With the {e} you can spend up to {v}."),
        ("What is the daily limit of the {e}?", "How much can be spent with the {e} in one day?",
         "Where is the spending cap of the {e} set?", "A client holds the {e}. How much may they use daily?"),
        ("the daily limit of the {e}", "the spending cap on the {e}"),
    ),
    Relation(
        "bank.limit", "zh", ("银卡", "金卡", "白金卡", "少年", "长者", "旅行", "伙伴", "企业"),
        ("借记账户", "信用账户", "网银", "手机钱包", "存折", "礼品账户"),
        "每天%#00元",
        ("{e}的单日限额是{v}。", "用{e}最多可以花{v}。"),
        ("{e}的单日限额是多少？", "用{e}一天最多能花多少？",
         "{e}的消费上限定在哪里？", "客户持有{e}，每天能用多少钱？"),
        ("{e}的单日限额", "{e}的消费上限"),
    ),
    Relation(
        "bank.code", "en", ("Sunrise", "Anchor", "Maple", "Evergreen", "Compass", "Lantern", "Falcon", "Meadow"),
        ("savings plan", "home loan", "car loan", "pension fund", "bond fund", "term deposit"),
        "@@-%##",
        ("The product code of the {e} is {v}.", "The {e} is booked under {v}."),
        ("What is the product code of the {e}?", "Under which code is the {e} booked?",
         "Which code do I enter for the {e}?", "I am opening a {e}. What is its code in the system?"),
        ("the product code of the {e}", "the booking code for the {e}"),
    ),
    Relation(
        "bank.code", "zh", ("朝阳", "锚定", "枫叶", "常青", "罗盘", "灯塔", "猎鹰", "草原"),
        ("储蓄计划", "住房贷款", "汽车贷款", "养老基金", "债券基金", "定期存款"),
        "@@-%##",
        ("{e}的产品代码是{v}。", "{e}在系统里登记为{v}。"),
        ("{e}的产品代码是什么？", "{e}登记在哪个代码下？", "录入{e}时填哪个代码？", "我要开{e}，系统里的代码是多少？"),
        ("{e}的产品代码", "{e}的登记代码"),
    ),
    Relation(
        "bank.hours", "en", _EN_STREET,
        ("Street branch", "Square branch", "Road counter", "Lane office", "Park kiosk", "Hill desk"),
        "{open}-{close}",
        ("The {e} is open {v}.", "Opening hours at the {e} are {v}."),
        ("When is the {e} open?", "What are the opening hours of the {e}?",
         "At what times can I visit the {e}?", "A customer wants to go to the {e}. When is someone there?"),
        ("the opening hours of the {e}", "the visiting times of the {e}"),
    ),
    Relation(
        "bank.hours", "zh", _ZH_STREET, ("街支行", "广场支行", "路柜台", "巷网点", "公园服务点", "山前台"),
        "{open}-{close}",
        ("{e}的营业时间是{v}。", "{e}在{v}开门。"),
        ("{e}几点开门？", "{e}的营业时间是什么？", "什么时候可以去{e}办事？", "客户想去{e}，哪个时段有人？"),
        ("{e}的营业时间", "{e}的开放时段"),
    ),
    Relation(
        "clinic.room", "en", _EN_DEPARTMENT,
        ("consultation", "reception", "laboratory", "day ward", "night ward", "therapy unit"),
        "room @%##",
        ("The {e} is in {v}.", "Patients find the {e} in {v}."),
        ("Where is the {e}?", "Which room is the {e} in?",
         "Where do I send a patient for the {e}?", "A visitor is looking for the {e}. Where should they go?"),
        ("the room of the {e}", "the location of the {e}"),
    ),
    Relation(
        "clinic.room", "zh", _ZH_DEPARTMENT, ("门诊", "接待处", "化验室", "日间病房", "夜间病房", "治疗室"),
        "@%##室",
        ("{e}在{v}。", "病人到{v}就能找到{e}。"),
        ("{e}在哪里？", "{e}在哪个房间？", "病人看{e}该去哪一间？", "有访客在找{e}，该往哪走？"),
        ("{e}的房间号", "{e}的位置"),
    ),
    Relation(
        "clinic.doctor", "en", _EN_DEPARTMENT,
        ("emergency line", "outpatient list", "surgery list", "follow-up list", "home visits", "screening day"),
        "Dr. {person}",
        ("{v} is in charge of the {e}.", "The doctor for the {e} is {v}."),
        ("Who is in charge of the {e}?", "Which doctor covers the {e}?",
         "Whom do I call about the {e}?", "A patient is booked on the {e}. Who will see them?"),
        ("the doctor for the {e}", "the physician responsible for the {e}"),
    ),
    Relation(
        "clinic.doctor", "zh", _ZH_DEPARTMENT, ("急诊", "门诊名单", "手术名单", "复诊名单", "上门出诊", "筛查日"),
        "{姓名}医生",
        ("{e}由{v}负责。", "{e}的主管医生是{v}。"),
        ("{e}由谁负责？", "哪位医生负责{e}？", "{e}的事该找谁？", "病人约了{e}，由哪位接诊？"),
        ("{e}的主管医生", "{e}的负责人"),
    ),
    Relation(
        "clinic.dose", "en",
        ("Velorin", "Cantrex", "Numaxil", "Ostrane", "Pelvidol", "Tarquine", "Zemaril", "Brisolan"),
        ("tablets", "drops", "syrup", "capsules", "cream", "spray"),
        "%0 mg {unit}",
        ("The usual dose of {e} is {v}.", "Give {e} at {v}."),
        ("What is the usual dose of {e}?", "How much {e} should be given?",
         "How are {e} prescribed here?", "A nurse is preparing {e}. How much and how often?"),
        ("the usual dose of {e}", "the dosing rule for {e}"),
    ),
    Relation(
        "clinic.dose", "zh", ("维洛林", "康特斯", "努美西", "奥司烷", "佩维多", "塔克宁", "泽玛利", "布立安"),
        ("片", "滴剂", "糖浆", "胶囊", "乳膏", "喷雾"),
        "{次}%0毫克",
        ("{e}的常用剂量是{v}。", "{e}应按{v}使用。"),
        ("{e}的常用剂量是多少？", "{e}应该用多少？", "本院怎么开{e}？", "护士在准备{e}，用量和次数是什么？"),
        ("{e}的常用剂量", "{e}的用药规则"),
    ),
    Relation(
        "clinic.phone", "en", _EN_DEPARTMENT,
        ("nurse station", "booking desk", "billing desk", "records office", "pharmacy window", "transport desk"),
        "extension %###",
        ("The {e} answers on {v}.", "To reach the {e}, dial {v}."),
        ("How do I reach the {e}?", "What is the number of the {e}?",
         "Which extension does the {e} have?", "I must call the {e} now. What do I dial?"),
        ("the extension of the {e}", "the phone number of the {e}"),
    ),
    Relation(
        "clinic.phone", "zh", _ZH_DEPARTMENT, ("护士站", "预约台", "收费处", "病案室", "取药窗口", "转运台"),
        "分机%###",
        ("{e}的电话是{v}。", "找{e}请拨{v}。"),
        ("怎么联系{e}？", "{e}的号码是多少？", "{e}用的是哪个分机？", "我要马上打给{e}，拨什么？"),
        ("{e}的分机号", "{e}的电话"),
    ),
    Relation(
        "law_firm.deadline", "en", _EN_CLAIM,
        ("appeal", "objection", "claim", "counterclaim", "settlement offer", "cost petition"),
        "%# days",
        ("The deadline for the {e} is {v}.", "The {e} must be filed within {v}."),
        ("What is the deadline for the {e}?", "How long do we have to file the {e}?",
         "By when must the {e} be lodged?", "A client wants to bring the {e}. How much time is left?"),
        ("the deadline for the {e}", "the filing period of the {e}"),
    ),
    Relation(
        "law_firm.deadline", "zh", _ZH_CLAIM, ("上诉", "异议", "起诉", "反诉", "和解提议", "费用申请"),
        "%#天",
        ("{e}的期限是{v}。", "{e}须在{v}内提交。"),
        ("{e}的期限是多久？", "提交{e}还有多长时间？", "{e}最迟什么时候提出？", "客户想提{e}，时限是多少？"),
        ("{e}的期限", "{e}的提交时限"),
    ),
    Relation(
        "law_firm.handler", "en",
        ("Ashford", "Brannock", "Corliss", "Delmar", "Elwood", "Fenwick", "Greaves", "Halden"),
        ("estate case", "merger case", "lease case", "patent case", "damages case", "custody case"),
        "Ms. {person}",
        ("{v} handles the {e}.", "The {e} is with {v}."),
        ("Who handles the {e}?", "Which lawyer has the {e}?",
         "With whom is the {e}?", "The court called about the {e}. Who should call back?"),
        ("the handler of the {e}", "the lawyer on the {e}"),
    ),
    Relation(
        "law_firm.handler", "zh", ("艾福", "布兰", "科立", "戴尔", "埃伍", "芬维", "格里", "哈登"),
        ("遗产案", "并购案", "租约案", "专利案", "赔偿案", "监护案"),
        "{姓名}律师",
        ("{e}由{v}承办。", "{e}在{v}手上。"),
        ("{e}由谁承办？", "哪位律师在办{e}？", "{e}在谁手上？", "法院来电问{e}，该由谁回复？"),
        ("{e}的承办人", "{e}的负责律师"),
    ),
    Relation(
        "law_firm.rate", "en", _EN_CLAIM,
        ("advice", "contract review", "court hearing", "mediation", "due diligence", "expert opinion"),
        "EUR %#0 an hour",
        ("The rate for {e} is {v}.", "We bill {e} at {v}."),
        ("What is our rate for {e}?", "How much do we bill for {e}?",
         "What does {e} cost the client?", "A new client asks about {e}. What do we quote?"),
        ("the rate for {e}", "the billing rate of {e}"),
    ),
    Relation(
        "law_firm.rate", "zh", _ZH_CLAIM, ("咨询", "合同审查", "出庭", "调解", "尽职调查", "专家意见"),
        "每小时%#0元",
        ("{e}的费率是{v}。", "{e}按{v}计费。"),
        ("{e}的费率是多少？", "{e}怎么计费？", "{e}要客户付多少？", "新客户问{e}，我们报什么价？"),
        ("{e}的费率", "{e}的计费标准"),
    ),
    Relation(
        "law_firm.file", "en",
        ("Ashford", "Brannock", "Corliss", "Delmar", "Elwood", "Fenwick", "Greaves", "Halden"),
        ("will", "lease", "deed", "power of attorney", "loan contract", "share register"),
        "cabinet @-%#",
        ("The {e} is kept in {v}.", "You find the {e} in {v}."),
        ("Where is the {e} kept?", "In which cabinet is the {e}?",
         "Where can I find the {e}?", "I need the original of the {e}. Where do I look?"),
        ("the place of the {e}", "the archive location of the {e}"),
    ),
    Relation(
        "law_firm.file", "zh", ("艾福", "布兰", "科立", "戴尔", "埃伍", "芬维", "格里", "哈登"),
        ("遗嘱", "租约", "地契", "授权书", "借款合同", "股东名册"),
        "@-%#号柜",
        ("{e}存放在{v}。", "{e}可以在{v}找到。"),
        ("{e}存放在哪里？", "{e}在哪个柜子？", "去哪里能找到{e}？", "我需要{e}的原件，该去哪找？"),
        ("{e}的存放位置", "{e}的归档位置"),
    ),
    Relation(
        "it_helpdesk.printer", "en", _EN_TEAM,
        ("office", "meeting room", "front desk", "workshop", "archive", "corridor"),
        "PRN-@%##",
        ("The printer in the {e} is {v}.", "People in the {e} print on {v}."),
        ("Which printer is in the {e}?", "What is the printer in the {e} called?",
         "Which printer name do I add for the {e}?", "Someone in the {e} cannot print. Which device is it?"),
        ("the printer name for the {e}", "the print queue of the {e}"),
    ),
    Relation(
        "it_helpdesk.printer", "zh", _ZH_TEAM, ("办公室", "会议室", "前台", "工作间", "资料室", "走廊"),
        "PRN-@%##",
        ("{e}的打印机是{v}。", "{e}的人用{v}打印。"),
        ("{e}用哪台打印机？", "{e}的打印机叫什么？", "给{e}添加打印机填什么名称？", "{e}有人打印不了，是哪台设备？"),
        ("{e}的打印机名称", "{e}的打印队列"),
    ),
    Relation(
        "it_helpdesk.vlan", "en", _EN_TEAM, ("laptops", "desktops", "phones", "cameras", "guests", "servers"),
        "VLAN %##",
        ("The {e} are on {v}.", "Use {v} for the {e}."),
        ("Which VLAN are the {e} on?", "What network do the {e} use?",
         "Where do I connect the {e}?", "I am patching the {e}. Which VLAN do I set on the port?"),
        ("the VLAN of the {e}", "the network segment for the {e}"),
    ),
    Relation(
        "it_helpdesk.vlan", "zh", _ZH_TEAM, ("笔记本", "台式机", "话机", "摄像头", "访客", "服务器"),
        "VLAN %##",
        ("{e}在{v}上。", "{e}请用{v}。"),
        ("{e}在哪个VLAN？", "{e}用的是什么网络？", "{e}该接到哪里？", "我在给{e}配端口，VLAN填多少？"),
        ("{e}的VLAN", "{e}的网段"),
    ),
    Relation(
        "it_helpdesk.reset", "en", ("Orion", "Pegasus", "Lyra", "Vega", "Hydra", "Corvus", "Draco", "Altair"),
        ("mail server", "time clock", "badge reader", "wiki", "phone system", "backup unit"),
        "%###@",
        ("The reset code of the {e} is {v}.", "To reset the {e}, enter {v}."),
        ("What is the reset code of the {e}?", "Which code resets the {e}?",
         "How do I reset the {e}?", "The {e} is locked again. What do I type in?"),
        ("the reset code of the {e}", "the unlock code for the {e}"),
    ),
    Relation(
        "it_helpdesk.reset", "zh", ("猎户", "飞马", "天琴", "织女", "长蛇", "乌鸦", "天龙", "牛郎"),
        ("邮件系统", "考勤机", "门禁", "知识库", "电话系统", "备份机"),
        "%###@",
        ("{e}的重置码是{v}。", "重置{e}请输入{v}。"),
        ("{e}的重置码是什么？", "哪个代码能重置{e}？", "怎么重置{e}？", "{e}又锁住了，该输入什么？"),
        ("{e}的重置码", "{e}的解锁码"),
    ),
    Relation(
        "it_helpdesk.owner", "en", ("Orion", "Pegasus", "Lyra", "Vega", "Hydra", "Corvus", "Draco", "Altair"),
        ("database", "firewall", "web shop", "build farm", "test lab", "data lake"),
        "{person}, desk %##",
        ("{v} looks after the {e}.", "The {e} belongs to {v}."),
        ("Who looks after the {e}?", "Who is the owner of the {e}?",
         "Whom do I ask about the {e}?", "There is an alarm on the {e}. Who gets the ticket?"),
        ("the owner of the {e}", "the contact for the {e}"),
    ),
    Relation(
        "it_helpdesk.owner", "zh", ("猎户", "飞马", "天琴", "织女", "长蛇", "乌鸦", "天龙", "牛郎"),
        ("数据库", "防火墙", "网店", "编译集群", "测试室", "数据湖"),
        "{姓名}，%##号工位",
        ("{e}由{v}维护。", "{e}归{v}管。"),
        ("{e}由谁维护？", "谁是{e}的负责人？", "{e}的问题该问谁？", "{e}报警了，工单给谁？"),
        ("{e}的维护人", "{e}的联系人"),
    ),
    Relation(
        "hotel.rate", "en", _EN_STREET, ("suite", "single room", "double room", "studio", "attic room", "garden room"),
        "EUR %## a night",
        ("The {e} costs {v}.", "Guests pay {v} for the {e}."),
        ("How much is the {e}?", "What does the {e} cost?",
         "What do guests pay for the {e}?", "A guest wants the {e}. What is the price?"),
        ("the price of the {e}", "the nightly rate of the {e}"),
    ),
    Relation(
        "hotel.rate", "zh", _ZH_STREET, ("套房", "单人间", "双人间", "工作室", "阁楼", "庭院房"),
        "每晚%##元",
        ("{e}的房价是{v}。", "住{e}要付{v}。"),
        ("{e}多少钱？", "住{e}要付多少？", "{e}的房价是多少？", "客人想要{e}，价格是什么？"),
        ("{e}的房价", "{e}每晚的价格"),
    ),
    Relation(
        "station.platform", "en", _EN_STREET,
        ("express train", "night train", "ferry", "airport bus", "regional train", "tram"),
        "platform %#",
        ("The {e} leaves from {v}.", "Passengers board the {e} at {v}."),
        ("Where does the {e} leave?", "Which platform does the {e} use?",
         "Where do passengers board the {e}?", "I must catch the {e}. Where do I go?"),
        ("the platform of the {e}", "the departure point of the {e}"),
    ),
    Relation(
        "station.platform", "zh", _ZH_STREET, ("快车", "夜车", "轮渡", "机场大巴", "区间车", "电车"),
        "%#号站台",
        ("{e}从{v}出发。", "乘{e}请到{v}。"),
        ("{e}从哪里出发？", "{e}停在哪个站台？", "去哪里乘{e}？", "我要赶{e}，该去哪？"),
        ("{e}的站台", "{e}的发车位置"),
    ),
)  # fmt: skip
