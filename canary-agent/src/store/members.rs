//! Members of audiences, and until when: their rows.

use rusqlite::{Connection, Transaction, params};

use super::{StoredMember, sqlite::Failure};

/// Writes members in place of what was kept of them, and takes out those that are `gone`.
pub(super) fn keep(
    transaction: &Transaction<'_>,
    kept: &[StoredMember],
    gone: &[(String, ipnet::IpNet)],
) -> Result<(), Failure> {
    let mut insert =
        transaction.prepare_cached("INSERT OR REPLACE INTO member VALUES (?1, ?2, ?3, ?4, ?5)")?;
    for StoredMember { audience, network, boot_ms, boot_id, unix_ms } in kept {
        insert.execute(params![
            audience,
            network.to_string(),
            boot_ms.cast_signed(),
            boot_id,
            unix_ms.cast_signed()
        ])?;
    }
    let mut delete =
        transaction.prepare_cached("DELETE FROM member WHERE audience = ?1 AND network = ?2")?;
    for (audience, network) in gone {
        delete.execute(params![audience, network.to_string()])?;
    }
    Ok(())
}

/// All of them.
pub(super) fn all(connection: &Connection) -> Result<Vec<StoredMember>, Failure> {
    let mut statement = connection.prepare(
        "SELECT audience, network, boot_ms, boot_id, unix_ms FROM member ORDER BY audience, network",
    )?;
    let mut rows = statement.query(())?;
    let mut members = Vec::new();
    while let Some(row) = rows.next()? {
        let network: String = row.get(1)?;
        let network = network
            .parse()
            .map_err(|_| Failure::Damaged(format!("a member that is no network: {network}")))?;
        members.push(StoredMember {
            audience: row.get(0)?,
            network,
            boot_ms: row.get::<_, i64>(2)?.cast_unsigned(),
            boot_id: row.get(3)?,
            unix_ms: row.get::<_, i64>(4)?.cast_unsigned(),
        });
    }
    Ok(members)
}
