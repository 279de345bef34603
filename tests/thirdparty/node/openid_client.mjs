// openid-client, with every check it has. The one thing allowed is http, since the service under test is on loopback.
import * as openid from 'openid-client';

import { visit } from './dialogue.mjs';

const AUTHENTICATION = {
  client_secret_basic: openid.ClientSecretBasic,
  client_secret_post: openid.ClientSecretPost,
  none: openid.None,
};

async function discovered({ issuer, client, algorithm, hybrid }) {
  const { client_secret: secret, ...metadata } = client;
  const authentication = AUTHENTICATION[client.token_endpoint_auth_method](secret);
  const execute = [openid.allowInsecureRequests, openid.enableNonRepudiationChecks];
  if (hybrid) execute.push(openid.useCodeIdTokenResponseType);
  return openid.discovery(new URL(issuer), client.client_id, metadata, authentication, { algorithm, execute });
}

// What a caller of the library learns of a refusal.
async function refusal(promise) {
  try {
    await promise;
  } catch (problem) {
    const [challenge] = Array.isArray(problem.cause) ? problem.cause : [];
    const error = problem.error ?? challenge?.parameters.error ?? null;
    return { kind: problem.constructor.name, error, status: problem.status ?? null };
  }
  throw new Error('it was not refused');
}

export async function metadata(told) {
  return (await discovered(told)).serverMetadata();
}

export async function clientCredentials(told) {
  return openid.clientCredentialsGrant(await discovered(told), told.request);
}

export async function refusedClientCredentials(told) {
  return refusal(openid.clientCredentialsGrant(await discovered(told), told.request));
}

export async function refresh(told) {
  return openid.refreshTokenGrant(await discovered(told), told.refresh_token, told.request);
}

export async function refusedRefresh(told) {
  return refusal(openid.refreshTokenGrant(await discovered(told), told.refresh_token, told.request));
}

export async function introspect(told) {
  return openid.tokenIntrospection(await discovered(told), told.token);
}

export async function revoke(told) {
  await openid.tokenRevocation(await discovered(told), told.token);
  return {};
}

// The way to the redirect URI and back: what arrived there, and what the library shall hold it to.
async function authorized(config, told, nonce) {
  const pkceCodeVerifier = openid.randomPKCECodeVerifier();
  const expectedState = openid.randomState();
  const parameters = new URLSearchParams({
    redirect_uri: told.client.redirect_uris[0],
    code_challenge: await openid.calculatePKCECodeChallenge(pkceCodeVerifier),
    code_challenge_method: 'S256',
    state: expectedState,
    ...(nonce === undefined ? {} : { nonce }),
    ...told.request,
  });
  const build = told.pushed ? openid.buildAuthorizationUrlWithPAR : openid.buildAuthorizationUrl;
  const arrived = await visit(await build(config, parameters));
  const maxAge = told.request.max_age === undefined ? undefined : Number(told.request.max_age);
  return [arrived, { pkceCodeVerifier, expectedState, expectedNonce: nonce, maxAge, idTokenExpected: nonce !== undefined }];
}

async function granted(told, nonce) {
  const config = await discovered(told);
  const [arrived, checks] = await authorized(config, told, nonce);
  return [config, await openid.authorizationCodeGrant(config, arrived, checks, told.token_request)];
}

export async function signIn(told) {
  const [config, tokens] = await granted(told, openid.randomNonce());
  const claims = tokens.claims();
  return { tokens, claims, userinfo: await openid.fetchUserInfo(config, tokens.access_token, claims.sub) };
}

export async function refusedSignIn(told) {
  return refusal(granted(told, openid.randomNonce()));
}

export async function refusedUserinfo(told) {
  return refusal(openid.fetchUserInfo(await discovered(told), told.token, told.subject));
}

// Without OpenID Connect: there is no nonce, and nothing is learned of the person.
export async function authorizeOnly(told) {
  const [, tokens] = await granted(told);
  return tokens;
}

export async function signOut(told) {
  const config = await discovered(told);
  const state = openid.randomState();
  const [post_logout_redirect_uri] = told.client.post_logout_redirect_uris;
  const url = openid.buildEndSessionUrl(config, { id_token_hint: told.id_token, post_logout_redirect_uri, state });
  const arrived = await visit(url);
  if (arrived.searchParams.get('state') !== state) throw new Error(`the state did not come back: ${arrived}`);
  return { arrived: arrived.origin + arrived.pathname };
}
