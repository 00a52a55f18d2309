"""The words, each with all its forms written out: Romanian is too irregular to be derived.

Tables are read line by line, columns apart by ``|``; the header of each says what the columns are.
"""

# ruff: noqa: E501  (a row is read as one line)

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Gender = Literal["m", "f", "n"]

# singular, plural | gender | a ..., the ..., of/to the ... | plural of the same three | adjective groups | tags
_NOUNS = """
boy boys | m | băiat băiatul băiatului | băieți băieții băieților | person | person
child children | m | copil copilul copilului | copii copiii copiilor | person | person
man men | m | bărbat bărbatul bărbatului | bărbați bărbații bărbaților | person | person
teacher teachers | m | profesor profesorul profesorului | profesori profesorii profesorilor | person | person
student students | m | student studentul studentului | studenți studenții studenților | person | person
doctor doctors | m | medic medicul medicului | medici medicii medicilor | person | person
neighbour neighbours | m | vecin vecinul vecinului | vecini vecinii vecinilor | person | person owned
friend friends | m | prieten prietenul prietenului | prieteni prietenii prietenilor | person | person owned
baker bakers | m | brutar brutarul brutarului | brutari brutarii brutarilor | person | person
driver drivers | m | șofer șoferul șoferului | șoferi șoferii șoferilor | person | person
farmer farmers | m | fermier fermierul fermierului | fermieri fermierii fermierilor | person | person
painter painters | m | pictor pictorul pictorului | pictori pictorii pictorilor | person | person
king kings | m | rege regele regelui | regi regii regilor | person | person
girl girls | f | fată fata fetei | fete fetele fetelor | person | person
woman women | f | femeie femeia femeii | femei femeile femeilor | person | person
nurse nurses | f | asistentă asistenta asistentei | asistente asistentele asistentelor | person | person
actress actresses | f | actriță actrița actriței | actrițe actrițele actrițelor | person | person
queen queens | f | regină regina reginei | regine reginele reginelor | person | person
brother brothers | m | frate fratele fratelui | frați frații fraților | person | kin
sister sisters | f | soră sora surorii | surori surorile surorilor | person | kin
uncle uncles | m | unchi unchiul unchiului | unchi unchii unchilor | person | kin
aunt aunts | f | mătușă mătușa mătușii | mătuși mătușile mătușilor | person | kin
grandfather grandfathers | m | bunic bunicul bunicului | bunici bunicii bunicilor | person | kin only_one
grandmother grandmothers | f | bunică bunica bunicii | bunici bunicile bunicilor | person | kin only_one
mother mothers | f | mamă mama mamei | mame mamele mamelor | person | kin only_one

dog dogs | m | câine câinele câinelui | câini câinii câinilor | animal | animal tame pet
cat cats | f | pisică pisica pisicii | pisici pisicile pisicilor | animal | animal tame pet
horse horses | m | cal calul calului | cai caii cailor | animal | animal tame farm
cow cows | f | vacă vaca vacii | vaci vacile vacilor | animal | animal tame farm
goat goats | f | capră capra caprei | capre caprele caprelor | animal | animal tame farm
bird birds | f | pasăre pasărea păsării | păsări păsările păsărilor | animal | animal tame small
hen hens | f | găină găina găinii | găini găinile găinilor | animal | animal tame farm
rabbit rabbits | m | iepure iepurele iepurelui | iepuri iepurii iepurilor | animal | animal tame small
bear bears | m | urs ursul ursului | urși urșii urșilor | animal | animal wild
wolf wolves | m | lup lupul lupului | lupi lupii lupilor | animal | animal wild
fox foxes | f | vulpe vulpea vulpii | vulpi vulpile vulpilor | animal | animal wild

book books | f | carte cartea cărții | cărți cărțile cărților | text make | text portable goods gift
letter letters | f | scrisoare scrisoarea scrisorii | scrisori scrisorile scrisorilor | text | text written portable mail
newspaper newspapers | n | ziar ziarul ziarului | ziare ziarele ziarelor | text | text portable goods
story stories | f | poveste povestea poveștii | povești poveștile poveștilor | text | text written told heard
poem poems | f | poezie poezia poeziei | poezii poeziile poeziilor | text study | text written heard learned
song songs | n | cântec cântecul cântecului | cântece cântecele cântecelor | text | sung heard learned
lesson lessons | f | lecție lecția lecției | lecții lecțiile lecțiilor | study | learned
question questions | f | întrebare întrebarea întrebării | întrebări întrebările întrebărilor | study | understood
film films | n | film filmul filmului | filme filmele filmelor | text | watched
photo photos | f | fotografie fotografia fotografiei | fotografii fotografiile fotografiilor | make | portable mail shown
map maps | f | hartă harta hărții | hărți hărțile hărților | make | portable shown goods

door doors | f | ușă ușa ușii | uși ușile ușilor | make color | opened repaired
gate gates | f | poartă poarta porții | porți porțile porților | make color | opened repaired
window windows | f | fereastră fereastra ferestrei | ferestre ferestrele ferestrelor | make | opened washed
box boxes | f | cutie cutia cutiei | cutii cutiile cutiilor | make color weight | opened portable
bag bags | f | geantă geanta genții | genți gențile genților | make color weight | opened portable goods
gift gifts | n | cadou cadoul cadoului | cadouri cadourile cadourilor | price | portable mail
key keys | f | cheie cheia cheii | chei cheile cheilor | make | portable
pencil pencils | n | creion creionul creionului | creioane creioanele creioanelor | make color | portable goods gift
notebook notebooks | n | caiet caietul caietului | caiete caietele caietelor | make color | portable goods gift
table tables | f | masă masa mesei | mese mesele meselor | make | goods repaired washed
chair chairs | n | scaun scaunul scaunului | scaune scaunele scaunelor | make color | goods repaired
lamp lamps | f | lampă lampa lămpii | lămpi lămpile lămpilor | make | goods repaired
clock clocks | n | ceas ceasul ceasului | ceasuri ceasurile ceasurilor | make price | goods repaired
phone phones | n | telefon telefonul telefonului | telefoane telefoanele telefoanelor | make price | portable goods repaired
bicycle bicycles | f | bicicletă bicicleta bicicletei | biciclete bicicletele bicicletelor | make color price | goods repaired washed
car cars | f | mașină mașina mașinii | mașini mașinile mașinilor | make color price | goods repaired washed
boat boats | f | barcă barca bărcii | bărci bărcile bărcilor | make color | goods repaired drawn
plate plates | f | farfurie farfuria farfuriei | farfurii farfuriile farfuriilor | make clean | goods washed
cup cups | f | ceașcă ceașca ceștii | cești ceștile ceștilor | make clean | goods washed
shirt shirts | f | cămașă cămașa cămășii | cămăși cămășile cămășilor | color clean price | goods worn washed
dress dresses | f | rochie rochia rochiei | rochii rochiile rochiilor | color clean price | goods worn washed
hat hats | f | pălărie pălăria pălăriei | pălării pălăriile pălăriilor | make color price | goods worn
coat coats | n | palton paltonul paltonului | paltoane paltoanele paltoanelor | color price make | goods worn
shoe shoes | m | pantof pantoful pantofului | pantofi pantofii pantofilor | color price clean | pair goods worn
umbrella umbrellas | f | umbrelă umbrela umbrelei | umbrele umbrelele umbrelelor | make color | portable goods
ball balls | f | minge mingea mingii | mingi mingile mingilor | make color | portable goods gift
toy toys | f | jucărie jucăria jucăriei | jucării jucăriile jucăriilor | make price | portable goods gift
painting paintings | n | tablou tabloul tabloului | tablouri tablourile tablourilor | make price | goods shown
ticket tickets | n | bilet biletul biletului | bilete biletele biletelor | price | portable goods mail
flower flowers | f | floare floarea florii | flori florile florilor | color nature | goods gift drawn
tree trees | m | copac copacul copacului | copaci copacii copacilor | nature size | drawn

apple apples | n | măr mărul mărului | mere merele merelor | fruit | food goods feed gift
pear pears | f | pară para perei | pere perele perelor | fruit | food goods feed gift
cake cakes | f | prăjitură prăjitura prăjiturii | prăjituri prăjiturile prăjiturilor | treat | food goods baked gift
egg eggs | n | ou oul oului | ouă ouăle ouălor | fresh | food goods

house houses | f | casă casa casei | case casele caselor | place color | built drawn
bridge bridges | n | pod podul podului | poduri podurile podurilor | place | built drawn
tower towers | n | turn turnul turnului | turnuri turnurile turnurilor | place | built drawn
church churches | f | biserică biserica bisericii | biserici bisericile bisericilor | place | built visited drawn
school schools | f | școală școala școlii | școli școlile școlilor | place | built
museum museums | n | muzeu muzeul muzeului | muzee muzeele muzeelor | place | visited built
city cities | n | oraș orașul orașului | orașe orașele orașelor | place quiet | visited
village villages | n | sat satul satului | sate satele satelor | place quiet | visited
garden gardens | f | grădină grădina grădinii | grădini grădinile grădinilor | place quiet | area
park parks | n | parc parcul parcului | parcuri parcurile parcurilor | place quiet | visited
yard yards | f | curte curtea curții | curți curțile curților | size clean | area
forest forests | f | pădure pădurea pădurii | păduri pădurile pădurilor | size quiet | area
street streets | f | stradă strada străzii | străzi străzile străzilor | size quiet clean | area
market markets | f | piață piața pieței | piețe piețele piețelor | place | area
hospital hospitals | n | spital spitalul spitalului | spitale spitalele spitalelor | place | built
library libraries | f | bibliotecă biblioteca bibliotecii | biblioteci bibliotecile bibliotecilor | place quiet | visited
shop shops | n | magazin magazinul magazinului | magazine magazinele magazinelor | place | opened
station stations | f | gară gara gării | gări gările gărilor | place | area
kitchen kitchens | f | bucătărie bucătăria bucătăriei | bucătării bucătăriile bucătăriilor | size clean | area
room rooms | f | cameră camera camerei | camere camerele camerelor | size clean quiet | area
lake lakes | n | lac lacul lacului | lacuri lacurile lacurilor | size quiet | area
river rivers | n | râu râul râului | râuri râurile râurilor | size | area
bed beds | n | pat patul patului | paturi paturile paturilor | make | goods
"""

# English | without article, the ... | adjective groups | tags   (uncountable, singular only)
_MASS_NOUNS = """
bread | f | pâine pâinea pâinii | fresh | food baked feed
cheese | f | brânză brânza brânzei | fresh | food
fish | m | pește peștele peștelui | fresh | food cooked
soup | f | supă supa supei | served | food cooked
rice | n | orez orezul orezului | served | food cooked
milk | n | lapte laptele laptelui | served | drink
water | f | apă apa apei | served | drink watering
tea | n | ceai ceaiul ceaiului | served | drink
coffee | f | cafea cafeaua cafelei | served | drink
juice | n | suc sucul sucului | served | drink
"""

# English | masculine, feminine singular | masculine, feminine plural | groups of nouns that it suits
_ADJECTIVES = """
tall | înalt înaltă | înalți înalte | person
young | tânăr tânără | tineri tinere | person
old | bătrân bătrână | bătrâni bătrâne | person animal
happy | fericit fericită | fericiți fericite | person
sad | trist tristă | triști triste | person
tired | obosit obosită | obosiți obosite | person animal
clever | deștept deșteaptă | deștepți deștepte | person
kind | amabil amabilă | amabili amabile | person
sick | bolnav bolnavă | bolnavi bolnave | person animal
rich | bogat bogată | bogați bogate | person
poor | sărac săracă | săraci sărace | person
famous | celebru celebră | celebri celebre | person
brave | curajos curajoasă | curajoși curajoase | person
lazy | leneș leneșă | leneși leneșe | person animal
hungry | flămând flămândă | flămânzi flămânde | animal
strong | puternic puternică | puternici puternice | person animal
fast | rapid rapidă | rapizi rapide | animal
big | mare mare | mari mari | animal make place size fruit nature
small | mic mică | mici mici | animal make place size fruit
new | nou nouă | noi noi | text make place
old | vechi veche | vechi vechi | text make place
beautiful | frumos frumoasă | frumoși frumoase | text animal place nature make
interesting | interesant interesantă | interesanți interesante | text study
long | lung lungă | lungi lungi | text study
short | scurt scurtă | scurți scurte | text study
difficult | dificil dificilă | dificili dificile | study
red | roșu roșie | roșii roșii | color fruit
white | alb albă | albi albe | color animal
black | negru neagră | negri negre | color animal
green | verde verde | verzi verzi | color fruit
yellow | galben galbenă | galbeni galbene | color fruit
blue | albastru albastră | albaștri albastre | color
expensive | scump scumpă | scumpi scumpe | price
cheap | ieftin ieftină | ieftini ieftine | price
heavy | greu grea | grei grele | weight
empty | gol goală | goi goale | weight
clean | curat curată | curați curate | clean
dirty | murdar murdară | murdari murdare | clean
quiet | liniștit liniștită | liniștiți liniștite | quiet
sweet | dulce dulce | dulci dulci | fruit treat
fresh | proaspăt proaspătă | proaspeți proaspete | fresh fruit treat
good | bun bună | buni bune | treat fresh served text
warm | cald caldă | calzi calde | served
cold | rece rece | reci reci | served
"""

# English: bare, he/she, past, -ing | present I, you, he/she, we, you all, they | să ... (he, they) | participle
# | infinitive | command (one person) | who does it | to what (tags of the object)
_VERBS = """
read, reads, read, reading | citesc citești citește citim citiți citesc | citească | citit | citi | citește | person | text
write, writes, wrote, writing | scriu scrii scrie scriem scrieți scriu | scrie | scris | scrie | scrie | person | written
eat, eats, ate, eating | mănânc mănânci mănâncă mâncăm mâncați mănâncă | mănânce | mâncat | mânca | mănâncă | person | food
eat, eats, ate, eating | mănânc mănânci mănâncă mâncăm mâncați mănâncă | mănânce | mâncat | mânca | mănâncă | animal | feed
drink, drinks, drank, drinking | beau bei bea bem beți beau | bea | băut | bea | bea | person | drink
drink, drinks, drank, drinking | beau bei bea bem beți beau | bea | băut | bea | bea | animal | watering
buy, buys, bought, buying | cumpăr cumperi cumpără cumpărăm cumpărați cumpără | cumpere | cumpărat | cumpăra | cumpără | person | goods
sell, sells, sold, selling | vând vinzi vinde vindem vindeți vând | vândă | vândut | vinde | vinde | person | goods
open, opens, opened, opening | deschid deschizi deschide deschidem deschideți deschid | deschidă | deschis | deschide | deschide | person | opened
close, closes, closed, closing | închid închizi închide închidem închideți închid | închidă | închis | închide | închide | person | opened
wash, washes, washed, washing | spăl speli spală spălăm spălați spală | spele | spălat | spăla | spală | person | washed
repair, repairs, repaired, repairing | repar repari repară reparăm reparați repară | repare | reparat | repara | repară | person | repaired
draw, draws, drew, drawing | desenez desenezi desenează desenăm desenați desenează | deseneze | desenat | desena | desenează | person | drawn animal
bring, brings, brought, bringing | aduc aduci aduce aducem aduceți aduc | aducă | adus | aduce | adu | person | portable food
look for, looks for, looked for, looking for | caut cauți caută căutăm căutați caută | caute | căutat | căuta | caută | person | portable worn pet
find, finds, found, finding | găsesc găsești găsește găsim găsiți găsesc | găsească | găsit | găsi | găsește | person | portable worn pet
wear, wears, wore, wearing | port porți poartă purtăm purtați poartă | poarte | purtat | purta | poartă | person | worn
build, builds, built, building | construiesc construiești construiește construim construiți construiesc | construiască | construit | construi | construiește | person | built
visit, visits, visited, visiting | vizitez vizitezi vizitează vizităm vizitați vizitează | viziteze | vizitat | vizita | vizitează | person | visited
feed, feeds, fed, feeding | hrănesc hrănești hrănește hrănim hrăniți hrănesc | hrănească | hrănit | hrăni | hrănește | person | tame
learn, learns, learned, learning | învăț înveți învață învățăm învățați învață | învețe | învățat | învăța | învață | person | learned
sing, sings, sang, singing | cânt cânți cântă cântăm cântați cântă | cânte | cântat | cânta | cântă | person | sung
listen to, listens to, listened to, listening to | ascult asculți ascultă ascultăm ascultați ascultă | asculte | ascultat | asculta | ascultă | person | heard
cook, cooks, cooked, cooking | gătesc gătești gătește gătim gătiți gătesc | gătească | gătit | găti | gătește | person | cooked
bake, bakes, baked, baking | coc coci coace coacem coaceți coc | coacă | copt | coace | coace | person | baked
follow, follows, followed, following | urmăresc urmărești urmărește urmărim urmăriți urmăresc | urmărească | urmărit | urmări | urmărește | animal | small
"""

# The same columns; these take the simple present in English ("sees", not "is seeing").
_STATIVE_VERBS = """
see, sees, saw, seeing | văd vezi vede vedem vedeți văd | vadă | văzut | vedea | - | person | animal drawn built watched
want, wants, wanted, wanting | vreau vrei vrea vrem vreți vor | vrea | vrut | vrea | - | person | goods food drink
have, has, had, having | am ai are avem aveți au | aibă | avut | avea | - | person | portable goods pet worn
understand, understands, understood, understanding | înțeleg înțelegi înțelege înțelegem înțelegeți înțeleg | înțeleagă | înțeles | înțelege | - | person | understood learned
"""

# The same columns; the object is a person, so Romanian wants "pe" and a pronoun that doubles it.
_PERSON_VERBS = """
help, helps, helped, helping | ajut ajuți ajută ajutăm ajutați ajută | ajute | ajutat | ajuta | - | person | person
wait for, waits for, waited for, waiting for | aștept aștepți așteaptă așteptăm așteptați așteaptă | aștepte | așteptat | aștepta | - | person | person
look for, looks for, looked for, looking for | caut cauți caută căutăm căutați caută | caute | căutat | căuta | - | person | person
visit, visits, visited, visiting | vizitez vizitezi vizitează vizităm vizitați vizitează | viziteze | vizitat | vizita | - | person | person
call, calls, called, calling | sun suni sună sunăm sunați sună | sune | sunat | suna | - | person | person
invite, invites, invited, inviting | invit inviți invită invităm invitați invită | invite | invitat | invita | - | person | person
"""
_STATIVE_PERSON_VERBS = """
see, sees, saw, seeing | văd vezi vede vedem vedeți văd | vadă | văzut | vedea | - | person | person
hear, hears, heard, hearing | aud auzi aude auzim auziți aud | audă | auzit | auzi | - | person | person
know, knows, knew, knowing | cunosc cunoști cunoaște cunoaștem cunoașteți cunosc | cunoască | cunoscut | cunoaște | - | person | person
love, loves, loved, loving | iubesc iubești iubește iubim iubiți iubesc | iubească | iubit | iubi | - | person | person
"""

# The same columns; a thing is given to somebody.
_GIVING_VERBS = """
give, gives, gave, giving | dau dai dă dăm dați dau | dea | dat | da | dă | person | gift portable
send, sends, sent, sending | trimit trimiți trimite trimitem trimiteți trimit | trimită | trimis | trimite | trimite | person | mail
show, shows, showed, showing | arăt arăți arată arătăm arătați arată | arate | arătat | arăta | arată | person | shown mail
bring, brings, brought, bringing | aduc aduci aduce aducem aduceți aduc | aducă | adus | aduce | adu | person | gift food
tell, tells, told, telling | spun spui spune spunem spuneți spun | spună | spus | spune | spune | person | told
"""

# The same columns without an object; the tags are the places where it is done. "se" marks a reflexive verb.
_PLACE_VERBS = """
sleep, sleeps, slept, sleeping | dorm dormi doarme dormim dormiți dorm | doarmă | dormit | dormi | - | person animal | rest
work, works, worked, working | lucrez lucrezi lucrează lucrăm lucrați lucrează | lucreze | lucrat | lucra | - | person | job
wait, waits, waited, waiting | aștept aștepți așteaptă așteptăm așteptați așteaptă | aștepte | așteptat | aștepta | - | person | meet
sing, sings, sang, singing | cânt cânți cântă cântăm cântați cântă | cânte | cântat | cânta | - | person | open
dance, dances, danced, dancing | dansez dansezi dansează dansăm dansați dansează | danseze | dansat | dansa | - | person | open
run, runs, ran, running | alerg alergi aleargă alergăm alergați aleargă | alerge | alergat | alerga | - | person animal | open
swim, swims, swam, swimming | înot înoți înoată înotăm înotați înoată | înoate | înotat | înota | - | person pet | wet
play, plays, played, playing | se joc joci joacă jucăm jucați joacă | joace | jucat | juca | - | person pet | open
rest, rests, rested, resting | se odihnesc odihnești odihnește odihnim odihniți odihnesc | odihnească | odihnit | odihni | - | person animal | rest
walk, walks, walked, walking | se plimb plimbi plimbă plimbăm plimbați plimbă | plimbe | plimbat | plimba | - | person | open
"""

# The same columns without an object, for sentences without a place.
_FEELING_VERBS = """
laugh, laughs, laughed, laughing | râd râzi râde râdem râdeți râd | râdă | râs | râde | - | person | -
cry, cries, cried, crying | plâng plângi plânge plângem plângeți plâng | plângă | plâns | plânge | - | person | -
smile, smiles, smiled, smiling | zâmbesc zâmbești zâmbește zâmbim zâmbiți zâmbesc | zâmbească | zâmbit | zâmbi | - | person | -
"""

# The same columns; followed by a place that one moves to.
_MOVING_VERBS = """
go, goes, went, going | merg mergi merge mergem mergeți merg | meargă | mers | merge | - | person | -
come, comes, came, coming | vin vii vine venim veniți vin | vină | venit | veni | - | person | -
return, returns, returned, returning | se întorc întorci întoarce întoarcem întoarceți întorc | întoarcă | întors | întoarce | - | person | -
"""

# noun | at, in ... (English, Romanian) | to ... (Romanian) | what one does there. Romanian drops the article after
# these prepositions unless the noun is described further.
_PLACES = """
garden | in în | în | rest job open
school | at la | la | job meet
kitchen | in în | în | job
room | in în | în | rest
park | in în | în | rest open meet
city | in în | în | job
village | in în | în | job
forest | in în | în | open rest
yard | in în | în | open job
street | on pe | pe | meet
market | at la | la | job meet
hospital | at la | la | job
library | at la | la | job meet
church | at la | la | meet
shop | at la | la | job
station | at la | la | meet job
museum | at la | la | job meet
lake | in în | la | wet
river | in în | la | wet
"""

# noun | English, Romanian preposition: where small things and pets are. These prepositions drop the article too.
_SPOTS = """
table | on pe
table | under sub
chair | on pe
chair | under sub
bed | on pe
bed | under sub
box | in în
bag | in în
window | near lângă
door | near lângă
lamp | near lângă
house | near lângă
tree | under sub
"""

# English | Romanian: these two govern the genitive, so the noun keeps its article ("în fața casei").
GENITIVE_PREPOSITIONS = (("in front of", "în fața"), ("behind", "în spatele"))
GENITIVE_PLACES = ("house", "school", "church", "hospital", "shop", "station", "museum", "library")

ANTONYMS = (
    {"old", "young", "new"}, {"big", "small"}, {"long", "short"}, {"expensive", "cheap"}, {"clean", "dirty"},
    {"warm", "cold"}, {"happy", "sad"}, {"rich", "poor"}, {"heavy", "empty"},
    {"red", "white", "black", "green", "yellow", "blue"},
)  # fmt: skip
"""Adjectives of which only one can be said of the same thing."""

WOMEN = (("Maria", "Mariei"), ("Ana", "Anei"), ("Elena", "Elenei"), ("Ioana", "Ioanei"), ("Irina", "Irinei"))
"""Names of women, and their genitive and dative."""
MEN = ("Andrei", "Mihai", "Ion", "Radu", "Victor")
"""Names of men; genitive and dative put "lui" before them."""

NUMERALS = (
    ("two", "doi", "două"), ("three", "trei", "trei"), ("four", "patru", "patru"), ("five", "cinci", "cinci"),
    ("six", "șase", "șase"), ("seven", "șapte", "șapte"), ("eight", "opt", "opt"), ("nine", "nouă", "nouă"),
    ("ten", "zece", "zece"), ("twelve", "doisprezece", "douăsprezece"),
    ("twenty", "douăzeci de", "douăzeci de"), ("thirty", "treizeci de", "treizeci de"),
    ("forty", "patruzeci de", "patruzeci de"), ("fifty", "cincizeci de", "cincizeci de"),
)  # fmt: skip
"""English, masculine, feminine (also neuter: its plural is feminine)."""

POSSESSIVES = {
    "my": ("meu", "mea", "mei", "mele"),
    "your": ("tău", "ta", "tăi", "tale"),
    "our": ("nostru", "noastră", "noștri", "noastre"),
    "his": ("lui", "lui", "lui", "lui"),
    "her": ("ei", "ei", "ei", "ei"),
    "their": ("lor", "lor", "lor", "lor"),
}
"""Masculine and feminine singular, masculine and feminine plural of what is owned."""


@dataclass(frozen=True)
class Noun:
    en: str
    en_plural: str
    gender: Gender
    ro: str
    ro_the: str
    ro_of: str
    """Genitive and dative with the article."""
    ro_plural: str
    ro_the_plural: str
    ro_of_plural: str
    adjective_groups: frozenset[str]
    tags: frozenset[str]
    is_mass: bool = False


@dataclass(frozen=True)
class Adjective:
    en: str
    forms: dict[str, str]
    """By agreement: ms, fs, mp, fp."""
    groups: frozenset[str]


@dataclass(frozen=True)
class Verb:
    en: str
    en_s: str
    en_past: str
    en_ing: str
    present: tuple[str, ...]
    """I, you, he or she, we, you all, they."""
    subjunctive: str
    """After "să", third person; the other persons are those of the present."""
    participle: str
    infinitive: str
    command: str
    subjects: frozenset[str]
    objects: frozenset[str]
    is_stative: bool
    is_reflexive: bool


@dataclass(frozen=True)
class Place:
    noun: Noun
    en_at: str
    ro_at: str
    ro_to: str
    activities: frozenset[str]


def _rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in table.splitlines() if line.strip()]


def _read_nouns() -> tuple[Noun, ...]:
    nouns = []
    for english, gender, singular, plural, groups, tags in _rows(_NOUNS):
        en, en_plural = english.split()
        nouns.append(
            Noun(
                en, en_plural, gender, *singular.split(), *plural.split(),  # type: ignore[arg-type]
                frozenset(groups.split()), frozenset(tags.split()),
            )
        )  # fmt: skip
    for en, gender, singular, groups, tags in _rows(_MASS_NOUNS):
        nouns.append(
            Noun(
                en, "", gender, *singular.split(), "", "", "",  # type: ignore[arg-type]
                frozenset(groups.split()), frozenset(tags.split()), is_mass=True,
            )
        )  # fmt: skip
    return tuple(nouns)


def _read_adjectives() -> tuple[Adjective, ...]:
    adjectives = []
    for en, singular, plural, groups in _rows(_ADJECTIVES):
        forms = dict(zip(("ms", "fs", "mp", "fp"), [*singular.split(), *plural.split()], strict=True))
        adjectives.append(Adjective(en, forms, frozenset(groups.split())))
    return tuple(adjectives)


def _read_verbs(table: str, *, is_stative: bool = False) -> tuple[Verb, ...]:
    verbs = []
    for english, present, subjunctive, participle, infinitive, command, subjects, objects in _rows(table):
        is_reflexive = present.startswith("se ")
        persons = tuple(present.removeprefix("se ").split())
        assert len(persons) == 6, english
        verbs.append(
            Verb(
                *(part.strip() for part in english.split(",")), persons, subjunctive, participle, infinitive,
                "" if command == "-" else command, frozenset(subjects.split()), frozenset(objects.split()),
                is_stative, is_reflexive,
            )
        )  # fmt: skip
    return tuple(verbs)


NOUNS = _read_nouns()
NOUN_BY_NAME = {noun.en: noun for noun in NOUNS}
ADJECTIVES = _read_adjectives()
THING_VERBS = _read_verbs(_VERBS) + _read_verbs(_STATIVE_VERBS, is_stative=True)
PERSON_VERBS = _read_verbs(_PERSON_VERBS) + _read_verbs(_STATIVE_PERSON_VERBS, is_stative=True)
GIVING_VERBS = _read_verbs(_GIVING_VERBS)
PLACE_VERBS = _read_verbs(_PLACE_VERBS)
FEELING_VERBS = _read_verbs(_FEELING_VERBS)
MOVING_VERBS = _read_verbs(_MOVING_VERBS)
LIVE = Verb(
    "live", "lives", "lived", "living",
    ("locuiesc", "locuiești", "locuiește", "locuim", "locuiți", "locuiesc"), "locuiască", "locuit", "locui", "",
    frozenset({"person"}), frozenset(), is_stative=True, is_reflexive=False,
)  # fmt: skip
PLACES = tuple(
    Place(NOUN_BY_NAME[name], *at.split(), to, frozenset(activities.split()))
    for name, at, to, activities in _rows(_PLACES)
)
SPOTS = tuple((NOUN_BY_NAME[name], *prepositions.split()) for name, prepositions in _rows(_SPOTS))
