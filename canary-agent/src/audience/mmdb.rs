//! MaxMind DB files: which networks have a record that answers an expression.
//!
//! A record stands for many networks; it is read and asked once. Addresses of IPv4 lie under
//! `::/96` of a file for both families, and what else leads there is the same once more and is
//! left out: no client comes from it.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, Ipv6Addr},
    time::SystemTime,
};

use ipnet::IpNet;
use maxminddb::{MaxMindDbError, Reader, WithinOptions};

use super::{
    expression::{Asked, Expression, ExpressionError, Value},
    file::MAX_NETWORKS,
    network::Networks,
};

/// Records whose fields are shown when a field is not found.
const SHOWN_RECORDS: usize = 1000;

/// Why a file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum MmdbError {
    /// It can't be read.
    #[error("can't be read: {0}")]
    Unreadable(#[from] std::io::Error),
    /// It is none of the format, or damaged.
    #[error("is no MaxMind DB file, or damaged: {0}")]
    Damaged(#[from] MaxMindDbError),
    /// The expression does not fit the file.
    #[error(transparent)]
    Expression(#[from] ExpressionError),
    /// More networks answer than an agent can hold.
    #[error(
        "more than {MAX_NETWORKS} of its networks answer the expression: that is the most for all audiences together"
    )]
    TooMany,
}

/// A file.
pub struct Database {
    name: String,
    reader: Reader<Vec<u8>>,
}

/// What a file says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct About {
    /// Such as `GeoLite2-City`.
    pub kind: String,
    /// When it was built, if it says.
    pub built: Option<SystemTime>,
    /// Whether it has IPv6 as well.
    pub v6: bool,
}

/// What answers an expression.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selected {
    /// The networks.
    pub networks: Networks,
    /// How many records the file has.
    pub records: usize,
    /// How many of them answer.
    pub answering: usize,
}

impl Database {
    /// Reads the content of a file that is called `name`, and looks whether it is whole.
    ///
    /// # Errors
    /// It is no such file.
    pub fn from_bytes(name: String, bytes: Vec<u8>) -> Result<Self, MmdbError> {
        let reader = Reader::from_source(bytes)?;
        // Without a description, which writers of one's own files leave out, `verify` refuses any
        // file. What is damaged in such a one shows when its networks are selected.
        if !reader.metadata().description.is_empty() {
            reader.verify()?;
        }
        Ok(Self { name, reader })
    }

    /// What it says of itself.
    pub fn about(&self) -> About {
        let metadata = self.reader.metadata();
        About {
            kind: metadata.database_type.clone(),
            built: metadata.build_time().ok(),
            v6: metadata.ip_version == 6,
        }
    }

    /// The networks whose records answer `expression`.
    ///
    /// # Errors
    /// The expression asks for what no record has, or compares it with what it never is; there are
    /// too many networks; the file is damaged.
    pub fn select(&self, expression: &Expression) -> Result<Selected, MmdbError> {
        let mut asked = Asked::new(expression);
        let mut answers: HashMap<usize, bool> = HashMap::new();
        let mut nets = Vec::new();
        let mut answering = 0;
        for found in self.reader.networks(WithinOptions::default())? {
            let found = found?;
            let Some(offset) = found.offset() else { continue };
            let answer = match answers.get(&offset) {
                Some(answer) => *answer,
                None => {
                    let record: Option<Value> = found.decode()?;
                    let answer = record.is_some_and(|record| asked.ask(&record));
                    answering += usize::from(answer);
                    answers.insert(offset, answer);
                    answer
                }
            };
            if !answer {
                continue;
            }
            let network = found.network()?;
            let Ok(net) = IpNet::new(network.ip(), network.prefix()) else { continue };
            if nets.len() >= MAX_NETWORKS {
                return Err(MmdbError::TooMany);
            }
            // A record so high up that all of IPv4 is under it.
            if let IpNet::V6(v6) = net
                && v6.prefix_len() <= 96
                && v6.addr() == Ipv6Addr::UNSPECIFIED
            {
                nets.push(IpNet::new_assert(IpAddr::from([0, 0, 0, 0]), 0));
            }
            nets.push(net);
        }
        if let Err(error) = asked.check(&self.name, &[]) {
            // The fields are wanted only now, and they are many.
            let known = self.fields()?;
            return Err(asked.check(&self.name, &known).err().unwrap_or(error).into());
        }
        Ok(Selected { networks: Networks::new(nets), records: answers.len(), answering })
    }

    /// The fields of some records.
    fn fields(&self) -> Result<Vec<String>, MmdbError> {
        let (mut seen, mut fields) = (BTreeSet::new(), BTreeSet::new());
        for found in self.reader.networks(WithinOptions::default())? {
            let found = found?;
            let Some(offset) = found.offset() else { continue };
            if !seen.insert(offset) {
                continue;
            }
            if seen.len() > SHOWN_RECORDS {
                break;
            }
            if let Some(record) = found.decode::<Value>()? {
                record.leaves(&mut Vec::new(), &mut |path| {
                    fields.insert(path.join("."));
                });
            }
        }
        Ok(fields.into_iter().collect())
    }
}
