//! An expression's answer for a record, and whether its questions make sense for a file.

use super::{Comparison, Expression, ExpressionError, Field, Literal, Node, Step, Value};

/// What kinds of values a field has had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kinds {
    truth: bool,
    number: bool,
    text: bool,
    other: bool,
}

impl Kinds {
    fn add(&mut self, value: &Value) {
        match value {
            Value::Truth(_) => self.truth = true,
            Value::Number(_) => self.number = true,
            Value::Text(_) => self.text = true,
            Value::Bytes | Value::List(_) | Value::Map(_) => self.other = true,
        }
    }

    /// Whether there was a value at all.
    pub fn any(self) -> bool {
        self != Self::default()
    }

    fn has(self, literal: &Literal) -> bool {
        match literal {
            Literal::Truth(_) => self.truth,
            Literal::Number(_) => self.number,
            Literal::Text(_) => self.text,
        }
    }

    /// The kinds in a sentence.
    fn words(self) -> String {
        let Self { truth, number, text, other } = self;
        let words =
            [(text, "a text"), (number, "a number"), (truth, "a truth"), (other, "a list or map")];
        let words: Vec<&str> = words.iter().filter(|(is, _)| *is).map(|(_, word)| *word).collect();
        words.join(" or ")
    }
}

impl Literal {
    fn word(&self) -> &'static str {
        match self {
            Self::Truth(_) => "a truth",
            Self::Number(_) => "a number",
            Self::Text(_) => "a text",
        }
    }
}

/// An expression that is being asked about a file's records, and what it has found in them.
#[derive(Clone, Debug)]
pub struct Asked<'e> {
    expression: &'e Expression,
    /// By field.
    kinds: Vec<Kinds>,
}

impl<'e> Asked<'e> {
    /// Nothing has been asked yet.
    pub fn new(expression: &'e Expression) -> Self {
        Self { expression, kinds: vec![Kinds::default(); expression.fields] }
    }

    /// The answer for a record. Every field is looked at, whatever the answer depends on.
    pub fn ask(&mut self, record: &Value) -> bool {
        self.node(&self.expression.root, record)
    }

    fn look<'r>(&mut self, field: &Field, record: &'r Value) -> Option<&'r Value> {
        let value = record.get(&field.steps);
        if let (Some(value), Some(kinds)) = (value, self.kinds.get_mut(field.number)) {
            kinds.add(value);
        }
        value
    }

    fn node(&mut self, node: &Node, record: &Value) -> bool {
        match node {
            Node::Or(nodes) => nodes.iter().fold(false, |any, node| self.node(node, record) | any),
            Node::And(nodes) => nodes.iter().fold(true, |all, node| self.node(node, record) & all),
            Node::Not(node) => !self.node(node, record),
            Node::Exists(field) => self.look(field, record).is_some(),
            Node::Is(field) => self.look(field, record) == Some(&Value::Truth(true)),
            Node::Compare(field, comparison, literal) => {
                let value = self.look(field, record);
                value.is_some_and(|value| compare(value, *comparison, literal))
            }
            Node::In(field, literals) => self.look(field, record).is_some_and(|value| {
                literals.iter().any(|literal| compare(value, Comparison::Equal, literal))
            }),
        }
    }

    /// Whether the questions make sense for the records that were asked: each field was in one at
    /// least, and of the kind that it is compared with. `known` are the file's fields, for a word
    /// that was meant.
    ///
    /// # Errors
    /// The first that does not.
    pub fn check(&self, file: &str, known: &[String]) -> Result<(), ExpressionError> {
        self.check_node(&self.expression.root, file, known)
    }

    fn check_node(&self, node: &Node, file: &str, known: &[String]) -> Result<(), ExpressionError> {
        let (field, literals) = match node {
            Node::Or(nodes) | Node::And(nodes) => {
                return nodes.iter().try_for_each(|node| self.check_node(node, file, known));
            }
            Node::Not(node) => return self.check_node(node, file, known),
            Node::Exists(field) => (field, &[][..]),
            Node::Is(field) => (field, &[Literal::Truth(true)][..]),
            Node::Compare(field, _, literal) => (field, std::slice::from_ref(literal)),
            Node::In(field, literals) => (field, &literals[..]),
        };
        let kinds = self.kinds.get(field.number).copied().unwrap_or_default();
        let name = name(&field.steps);
        let error = |message, help| ExpressionError { message, span: field.span.clone(), help };
        if !kinds.any() {
            let help = match crate::config::nearest_word(&name, known.iter().map(String::as_str)) {
                Some(word) => Some(format!("did you mean `{word}`?")),
                None if known.is_empty() => None,
                None => Some(format!("it has {}", listed(known))),
            };
            return Err(error(format!("no record of `{file}` has `{name}`"), help));
        }
        match literals.iter().find(|literal| !kinds.has(literal)) {
            Some(literal) => {
                let message = format!(
                    "`{name}` is {} in `{file}`, and can't be compared with {}",
                    kinds.words(),
                    literal.word()
                );
                let help = (kinds.text && matches!(literal, Literal::Number(_)))
                    .then(|| "write the number between quotes".to_owned());
                Err(error(message, help))
            }
            None => Ok(()),
        }
    }
}

/// The first of the names, and how many there are beside.
fn listed(known: &[String]) -> String {
    const SHOWN: usize = 12;
    let names: Vec<String> = known.iter().take(SHOWN).map(|name| format!("`{name}`")).collect();
    let more = known.len().saturating_sub(SHOWN);
    match more {
        0 => names.join(", "),
        more => format!("{} and {more} more", names.join(", ")),
    }
}

/// A field as it is written.
fn name(steps: &[Step]) -> String {
    let word = |step: &Step| match step {
        Step::Key(key) => key.clone(),
        Step::Index(index) => index.to_string(),
    };
    steps.iter().map(word).collect::<Vec<_>>().join(".")
}

fn compare(value: &Value, comparison: Comparison, literal: &Literal) -> bool {
    let order = match (value, literal) {
        (Value::Text(a), Literal::Text(b)) => Some(a.as_str().cmp(b.as_str())),
        (Value::Number(a), Literal::Number(b)) => a.partial_cmp(b),
        (Value::Truth(a), Literal::Truth(b)) => Some(a.cmp(b)),
        _ => None,
    };
    order.is_some_and(|order| match comparison {
        Comparison::Equal => order.is_eq(),
        Comparison::Unequal => order.is_ne(),
        Comparison::Less => order.is_lt(),
        Comparison::AtMost => order.is_le(),
        Comparison::More => order.is_gt(),
        Comparison::AtLeast => order.is_ge(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Value {
        let json = r#"{
            "country": {"iso_code": "US", "geoname_id": 6252001},
            "subdivisions": [{"iso_code": "IA"}, {"iso_code": "X"}],
            "location": {"latitude": 41.6, "accuracy_radius": 20},
            "traits": {"is_anycast": true, "is_proxy": false}
        }"#;
        serde_json::from_str(json).unwrap()
    }

    fn ask(text: &str) -> bool {
        let expression = Expression::parse(text).unwrap();
        Asked::new(&expression).ask(&record())
    }

    #[test]
    fn tests_say_what_they_mean() {
        for (text, answer) in [
            (r#"country.iso_code == "US" && subdivisions.0.iso_code == "IA""#, true),
            (r#"country.iso_code != "US""#, false),
            (r#"country.iso_code in ["CA", "US"]"#, true),
            (r#"country.iso_code in ["CA"]"#, false),
            ("country.geoname_id == 6252001", true),
            ("location.latitude > 41.5 && location.latitude <= 41.6", true),
            ("location.latitude < -1", false),
            ("location.accuracy_radius >= 2e1", true),
            (r#"country.iso_code < "UT""#, true),
            ("traits.is_anycast", true),
            ("traits.is_proxy", false),
            ("!traits.is_proxy", true),
            ("traits.is_proxy == false", true),
            ("exists(location)", true),
            ("exists(subdivisions.2)", false),
            ("!exists(city)", true),
            // Nothing is known of what is not there.
            (r#"city.name == "Ames""#, false),
            (r#"city.name != "Ames""#, false),
            (r#"!(city.name == "Ames")"#, true),
            ("country", false),
            // `&&` binds closer.
            ("traits.is_anycast || traits.is_proxy && traits.is_proxy", true),
            ("(traits.is_anycast || traits.is_proxy) && traits.is_proxy", false),
        ] {
            assert_eq!(ask(text), answer, "{text}");
        }
    }

    #[test]
    fn questions_that_make_no_sense_are_found() {
        let known = ["country.iso_code".to_owned(), "traits.is_anycast".to_owned()];
        for (text, error) in [
            (r#"contry.iso_code == "US""#, "no record of `City.mmdb` has `contry.iso_code`"),
            (
                "country.iso_code == 5",
                "`country.iso_code` is a text in `City.mmdb`, and can't be compared with a number",
            ),
            ("traits.is_anycast == \"yes\"", "is a truth in"),
            ("country", "is a list or map"),
            ("traits.is_anycast && location.nowhere == 1", "no record"),
            (r#"country.iso_code in ["US", 1]"#, "can't be compared with a number"),
        ] {
            let expression = Expression::parse(text).unwrap();
            let mut asked = Asked::new(&expression);
            asked.ask(&record());
            let found = asked.check("City.mmdb", &known).expect_err(text);
            assert!(found.message.contains(error), "{text}: {found}");
            if text.starts_with("contry") {
                assert_eq!(found.help.as_deref(), Some("did you mean `country.iso_code`?"));
                assert_eq!(found.span, 0..15);
            }
        }
        // What stands behind an answer that is known already is looked at, too.
        let expression = Expression::parse("traits.is_anycast || nothing").unwrap();
        let mut asked = Asked::new(&expression);
        assert!(asked.ask(&record()) && asked.check("City.mmdb", &known).is_err());
    }
}
