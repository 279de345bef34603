// node run.mjs openid-client|oauth4webapi
import { serve } from './dialogue.mjs';

const modules = { 'openid-client': './openid_client.mjs', oauth4webapi: './oauth4webapi.mjs' };
await serve(await import(modules[process.argv[2]]));
