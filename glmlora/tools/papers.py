"""Synthetic papers for the demo and project folder: medical ones (label 1) and others (label 0).

No single word tells the classes apart: hospitals, patients and viruses turn up in papers of
logistics or computing, and algorithms, students and costs in medical ones. What a paper is about
follows from its words together.
"""

from __future__ import annotations

import csv
import io
import os
import random
from collections.abc import Sequence
from pathlib import Path

from ..files.write import atomic_file

# area -> (things studied, methods, measures)
MEDICAL = {
    "cardiology": (
        "heart failure|atrial fibrillation|coronary stenosis|hypertension|myocardial infarction|"
        "aortic valve disease|cardiac arrest|arterial stiffness",
        "echocardiography|beta blockade|catheter ablation|statin therapy|stress testing|"
        "anticoagulation",
        "ejection fraction|systolic pressure|troponin level|readmission|mortality|heart rate",
    ),
    "oncology": (
        "breast carcinoma|lung tumours|leukaemia|melanoma|colorectal cancer|lymphoma|glioma|"
        "prostate cancer",
        "chemotherapy|radiotherapy|biopsy|immunotherapy|resection|gene panel sequencing",
        "survival|tumour size|relapse|toxicity|response rate|metastasis",
    ),
    "infection": (
        "influenza|tuberculosis|hepatitis|sepsis|malaria|pneumonia|wound infection|measles",
        "vaccination|antibiotic treatment|antiviral drugs|serology|isolation of carriers|"
        "contact tracing",
        "antibody titre|viral load|fever|hospital stay|transmission|resistance",
    ),
    "neurology": (
        "stroke|epilepsy|migraine|dementia|multiple sclerosis|neuropathy|Parkinson disease|"
        "concussion",
        "magnetic resonance imaging|thrombolysis|nerve stimulation|levodopa|cognitive testing|"
        "rehabilitation",
        "seizure frequency|cognition|gait|pain score|disability|sleep quality",
    ),
    "metabolism": (
        "diabetes|obesity|thyroid disease|osteoporosis|fatty liver|gestational diabetes|gout|"
        "kidney disease",
        "insulin therapy|dietary counselling|metformin|dialysis|bariatric surgery|"
        "vitamin D supplements",
        "glucose|body mass index|bone density|creatinine|insulin sensitivity|blood lipids",
    ),
    "surgery": (
        "hip fracture|hernia|appendicitis|spinal stenosis|burn wounds|cataract|gallstones|"
        "ligament injury",
        "laparoscopy|arthroscopy|general anaesthesia|suture techniques|implants|nerve blocks",
        "blood loss|complications|operating time|recovery|wound healing|postoperative pain",
    ),
    "psychiatry": (
        "depression|anxiety|schizophrenia|insomnia|addiction|autism|eating disorders|"
        "postpartum depression",
        "psychotherapy|antidepressants|group counselling|mindfulness|case management|sleep hygiene",
        "symptom score|relapse|adherence|wellbeing|hospital admission|quality of life",
    ),
    "paediatrics": (
        "asthma|preterm birth|neonatal jaundice|malnutrition|congenital heart defects|"
        "food allergy|dental caries|bronchiolitis",
        "breastfeeding support|inhaled steroids|newborn screening|phototherapy|oral rehydration|"
        "fluoride varnish",
        "birth weight|lung function|growth|oxygen saturation|feeding|hospital visits",
    ),
}
OTHER = {
    "machine learning": (
        "image recognition|text classification|recommendation|speech synthesis|graph embedding|"
        "anomaly detection|machine translation|time series forecasting",
        "a convolutional network|a transformer|contrastive learning|boosted trees|distillation|"
        "federated optimisation",
        "accuracy|training time|memory|robustness|calibration|throughput",
    ),
    "batteries": (
        "lithium cells|solid electrolytes|sodium anodes|electrode ageing|thermal runaway|"
        "fast charging|redox flow storage|battery recycling",
        "impedance spectroscopy|slurry coating|molecular dynamics|calorimetry|pulse charging|"
        "doping",
        "capacity|cycle life|energy density|internal resistance|cost|temperature",
    ),
    "networks": (
        "routing protocols|wireless backhaul|software defined networks|edge caching|"
        "intrusion detection|satellite links|peer discovery|congestion",
        "a distributed algorithm|queueing analysis|packet simulation|spectrum sharing|"
        "virus scanning|game theory",
        "latency|packet loss|energy use|coverage|fairness|bandwidth",
    ),
    "economics": (
        "housing markets|minimum wages|trade tariffs|bank lending|tax compliance|"
        "labour mobility|insurance demand|inflation expectations",
        "panel regression|a natural experiment|household surveys|auction design|"
        "difference in differences|input output tables",
        "prices|employment|welfare|risk|income|growth",
    ),
    "education": (
        "reading skills|online courses|teacher training|class size|school choice|"
        "mathematics homework|peer tutoring|examination stress",
        "classroom observation|a randomised trial|questionnaires|adaptive quizzes|interviews|"
        "curriculum reform",
        "test scores|attendance|motivation|dropout|satisfaction|engagement",
    ),
    "agriculture": (
        "wheat rust|soil erosion|rice irrigation|greenhouse tomatoes|dairy feed|plant disease|"
        "orchard pests|cover crops",
        "remote sensing|nitrogen fertiliser|crop rotation|field trials|drip irrigation|"
        "biological control",
        "yield|soil moisture|nutrient uptake|growth|labour|water use",
    ),
    "construction": (
        "bridge decks|concrete creep|tunnel linings|timber joints|seismic retrofits|"
        "pavement cracking|steel corrosion|hospital buildings",
        "finite element models|fibre reinforcement|load testing|laser scanning|grouting|"
        "ventilation design",
        "stiffness|fatigue|deflection|safety|durability|cost",
    ),
    "physics": (
        "quantum dots|plasma waves|neutron stars|superconducting films|optical lattices|"
        "granular flow|photonic crystals|spin glasses",
        "spectroscopy|Monte Carlo simulation|perturbation theory|laser cooling|interferometry|"
        "neutron scattering",
        "temperature|coherence|pressure|band gap|flux|noise",
    ),
    "ecology": (
        "coral reefs|forest fires|river fish|bird migration|invasive insects|wetland carbon|"
        "bat colonies|grassland diversity",
        "camera traps|tagging|species distribution models|satellite images|mark and recapture|"
        "field surveys",
        "abundance|survival|biomass|dispersal|mortality|habitat quality",
    ),
    "logistics": (
        "hospital supply chains|vehicle routing|warehouse picking|port scheduling|"
        "vaccine delivery routes|air cargo|blood bank inventories|retail replenishment",
        "integer programming|a genetic algorithm|discrete event simulation|demand forecasting|"
        "lean management|reinforcement learning",
        "cost|delay|service level|inventory|utilisation|emissions",
    ),
    "law": (
        "privacy regulation|patent disputes|medical liability|asylum procedures|antitrust cases|"
        "health insurance law|environmental permits|data protection",
        "doctrinal analysis|case studies|comparative review|interviews with judges|"
        "text mining of rulings|policy evaluation",
        "compliance|litigation|consistency|enforcement|access|penalties",
    ),
}
# sentences that either class may hold, so that no word belongs to one of them
ASIDES = [
    "Data from {n} patients of a public hospital were among the sources.",
    "Clinical records and a cost model were compared with a simple algorithm.",
    "A neural network served as a baseline model.",
    "Students, nurses and engineers took part in the survey.",
    "Treatment of missing values followed common practice.",
    "The disease of one worker delayed the second phase.",
    "Blood pressure, temperature and energy use were recorded by sensors.",
    "Risk and survival are discussed with regard to public health and the economy.",
    "The software, the virus scanner and the diagnosis module are open source.",
    "Doctors, farmers and teachers were asked about the drug, the soil and the school.",
    "The cell, the network and the material are described in the supplement.",
    "Therapy, training and transport are affected by the policy.",
]
TITLES = [
    "{topic}: {measure} under {method}",
    "Effects of {method} on {measure} in {topic}",
    "{method} for {topic}",
    "On the {measure} of {topic}",
    "{topic} and {other}: a study of {measure}",
    "Does {method} change {measure} in {topic}?",
]
OPENINGS = [
    "{topic} remains a challenge in many regions.",
    "Interest in {topic} has grown over the last decade.",
    "Little is known about {measure} in {topic}.",
    "Reports on {topic} and {other} disagree.",
]
AIMS = [
    "We examine whether {method} improves {measure}.",
    "This paper studies how {method} affects {measure} and {measure2}.",
    "Our aim is to compare {method} with {method2} for {topic}.",
    "The study asks which part of {measure} is explained by {method}.",
]
RESULTS = [
    "{measure} improved by {p} percent with {method}, while {measure2} did not change.",
    "After {n} months, {measure} was lower in the first group than in the second.",
    "We found a relation between {measure} and {measure2} in {n} cases.",
    "{method} outperformed {method2} in terms of {measure}.",
]
ENDINGS = [
    "The findings support the use of {method} in {topic}.",
    "Further work should test {method2} in larger samples.",
    "These results may guide decisions on {other}.",
    "Limits of the design and of {measure2} are discussed.",
]
NAMES = (
    "Li|Wang|Garcia|Smith|Okafor|Kim|Novak|Rossi|Silva|Patel|Haddad|Ivanova|Tanaka|Meyer|Dubois|"
    "Larsen|Nguyen|Costa|Khan|Brown"
).split("|")


def _paper(areas: dict, rng: random.Random) -> dict[str, str]:
    topics, methods, measures = (part.split("|") for part in areas[rng.choice(sorted(areas))])
    topic, other = rng.sample(topics, 2)
    method, method2 = rng.sample(methods, 2)
    measure, measure2 = rng.sample(measures, 2)
    words = dict(
        topic=topic,
        other=other,
        method=method,
        method2=method2,
        measure=measure,
        measure2=measure2,
    )

    def fill(pattern: str) -> str:
        text = pattern.format(n=rng.randint(12, 900), p=rng.randint(3, 60), **words)
        return text[0].upper() + text[1:]

    sentences = [fill(rng.choice(part)) for part in (OPENINGS, AIMS, RESULTS, ENDINGS)]
    for aside in rng.sample(ASIDES, rng.randint(2, 4)):
        sentences.insert(rng.randint(1, len(sentences)), fill(aside))
    authors = ", ".join(
        f"{rng.choice('ABCDEFGHJKLM')}. {rng.choice(NAMES)}" for _ in range(rng.randint(2, 6))
    )
    return {"title": fill(rng.choice(TITLES)), "author": authors, "abstract": " ".join(sentences)}


def make_papers(n: int, seed: int) -> list[dict]:
    """n papers, half of each class, shuffled; keys uuid, title, author, abstract, Keywords, label.

    No two share an abstract. The same for the same n and seed on every machine.
    """
    rng = random.Random(seed)
    labels = [1] * (n // 2) + [0] * (n - n // 2)
    rng.shuffle(labels)
    papers, seen = [], set()
    for uuid, label in enumerate(labels):
        paper = _paper(MEDICAL if label else OTHER, rng)
        while paper["abstract"] in seen:
            paper = _paper(MEDICAL if label else OTHER, rng)
        seen.add(paper["abstract"])
        papers.append({"uuid": uuid, **paper, "Keywords": "tmp", "label": label})
    return papers


def _write(path: Path, rows: Sequence[dict], columns: Sequence[str]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_file(path, "w") as f:
        f.write(text.getvalue())


def write_tables(
    directory: str | os.PathLike,
    train_rows: int = 1200,
    test_rows: int = 2000,
    seed: int = 20230711,
) -> None:
    """train.csv, testB.csv, testB_labels.csv and sample_submit.csv in `directory`, with the columns
    of the workflow's tables; papers of the test are not in the training table.
    """
    papers = make_papers(train_rows + test_rows, seed)
    train, test = papers[:train_rows], papers[train_rows:]
    test = [{**paper, "uuid": i} for i, paper in enumerate(test)]
    place = Path(directory)
    _write(place / "train.csv", train, ("uuid", "title", "author", "abstract", "Keywords", "label"))
    _write(place / "testB.csv", test, ("uuid", "title", "author", "abstract"))
    _write(place / "testB_labels.csv", test, ("uuid", "label"))
    sample = [{**paper, "label": 0} for paper in test]
    _write(place / "sample_submit.csv", sample, ("uuid", "Keywords", "label"))
