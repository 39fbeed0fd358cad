//! What a record consists of.

use std::{collections::BTreeMap, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, SeqAccess, Visitor},
};

use super::Step;

/// A part of a record.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A truth.
    Truth(bool),
    /// A number, whole or not. Whole ones beyond 2⁵³ are as near as that comes.
    Number(f64),
    /// A text.
    Text(String),
    /// Bytes, with which nothing can be done here.
    Bytes,
    /// Values in an order.
    List(Vec<Value>),
    /// Values by name.
    Map(BTreeMap<String, Value>),
}

impl Value {
    /// The value inside it that `steps` lead to.
    pub fn get(&self, steps: &[Step]) -> Option<&Self> {
        steps.iter().try_fold(self, |value, step| match (value, step) {
            (Self::Map(map), Step::Key(key)) => map.get(key),
            (Self::List(list), Step::Index(index)) => list.get(*index),
            _ => None,
        })
    }

    /// Calls `found` with the way to each value in it that is no list and no map.
    pub fn leaves(&self, path: &mut Vec<String>, found: &mut impl FnMut(&[String])) {
        match self {
            Self::List(list) => {
                for (at, value) in list.iter().enumerate() {
                    path.push(at.to_string());
                    value.leaves(path, found);
                    path.pop();
                }
            }
            Self::Map(map) => {
                for (key, value) in map {
                    path.push(key.clone());
                    value.leaves(path, found);
                    path.pop();
                }
            }
            Self::Truth(_) | Self::Number(_) | Self::Text(_) | Self::Bytes => found(path),
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Reader)
    }
}

struct Reader;

impl<'de> Visitor<'de> for Reader {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Truth(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value as f64))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value as f64))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Value, E> {
        Ok(Value::Number(value as f64))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Value, E> {
        Ok(Value::Number(value as f64))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Number(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_bytes<E>(self, _value: &[u8]) -> Result<Value, E> {
        Ok(Value::Bytes)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(value) = seq.next_element()? {
            list.push(value);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut map = BTreeMap::new();
        while let Some((key, value)) = access.next_entry()? {
            map.insert(key, value);
        }
        Ok(Value::Map(map))
    }
}
